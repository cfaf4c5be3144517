"""boto3's errors, translated to errors of the store."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from botocore import exceptions

from storage.store import AccessDenied, NotFound, PreconditionFailed, StoreError, StoreFull, StoreUnavailable

_NO_ANSWER = (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError)

_CREDENTIALS = (
    exceptions.NoCredentialsError,
    exceptions.PartialCredentialsError,
    exceptions.CredentialRetrievalError,
    exceptions.ProfileNotFound,
    exceptions.TokenRetrievalError,
    exceptions.SSOError,
)
_ABSENT = {"NoSuchKey", "404", "NotFound"}  # the answer to a HEAD has no body, so its code is the status
_DENIED = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"}  # some have the status 400
_UNAVAILABLE = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests"}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}


@contextmanager
def s3_errors(where: Mapping[str, str]) -> Iterator[None]:
    """Raise boto3's errors about an object, named by its Bucket and Key, as errors of the store."""
    try:
        yield
    except exceptions.ClientError as error:
        raise _answered(error, where) from error
    except _CREDENTIALS as error:
        raise AccessDenied(
            f"{url(where)}: no usable AWS credentials were found ({type(error).__name__}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or give the machine a role or a profile",
            public="the server has no AWS credentials; a public bucket is read without any (--unsigned-source)",
        ) from error
    except _NO_ANSWER as error:
        raise StoreUnavailable(f"{url(where)}: {error}") from error
    except exceptions.BotoCoreError as error:
        raise StoreError(f"{url(where)}: {error}") from error


def url(where: Mapping[str, str]) -> str:
    return f"s3://{where['Bucket']}/{where['Key']}"


def is_absent(error: BaseException | None) -> bool:
    """Whether the server answered that the object does not exist, in a bucket that exists."""
    return isinstance(error, exceptions.ClientError) and _code_of(error) in _ABSENT


def is_not_offered(error: BaseException | None) -> bool:
    """Whether the server may have refused a request because it does not implement the condition."""
    return isinstance(error, exceptions.ClientError) and status_of(error) in (400, 501)


def status_of(error: exceptions.ClientError) -> int:
    """The HTTP status of a server's answer; 0 if there is none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code_of(error: exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _answered(error: exceptions.ClientError, where: Mapping[str, str]) -> StoreError:
    # The message has the code only: an answer's text can name accounts and keys.
    code, status = _code_of(error), status_of(error)
    said = f"the server answered {status} {code}".rstrip()
    public = f"the bucket answered {status}"
    if code == "NoSuchBucket":
        return NotFound(f"{url(where)}: there is no bucket {where['Bucket']!r}")
    if code in _ABSENT:
        return NotFound(f"there is no object {url(where)}")
    if status == 404:
        return NotFound(f"{url(where)}: {said}")
    if status == 412 or code == "ConditionalRequestConflict":
        return PreconditionFailed(f"{url(where)} is not, or no longer, what was expected ({code})")
    if status in (401, 403) or code in _DENIED:
        may = "the server's AWS credentials may not read it; a public bucket is read without any (--unsigned-source)"
        return AccessDenied(f"{url(where)}: access denied; {said}", public=f"{public}: {may}")
    if code in _FULL or status == 507:
        return StoreFull(f"{url(where)}: no room left; {said}")
    if status >= 500 or status in (408, 429) or code in _UNAVAILABLE:
        return StoreUnavailable(f"{url(where)}: {said}, after every retry", public=public)
    return StoreError(f"{url(where)}: {said}", public=public)
