// Adding adapters: an upload by a file chooser or by dropping, and an import from a source.

import { Refusal, address, call, headers, refusalOf } from "./api.js";
import { byId, bytes, element } from "./dom.js";
import { Notices, attempt } from "./notices.js";

const BUNDLE = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer_config.json"];
const NAMED = 3; // of the files that are not needed
const ARCHIVES = [
  [/\.(tar\.gz|tgz)$/i, "application/gzip"],
  [/\.tar$/i, "application/x-tar"],
];

export class UploadForm {
  /** `find` gives the adapter of a name, `changed` is called after an upload. */
  constructor(find, changed) {
    this.notices = new Notices(byId("upload-form"));
    this.#find = find;
    this.#changed = changed;
    byId("files").addEventListener("change", (event) => this.#choose([...event.target.files]));
    byId("upload-name").addEventListener("input", () => this.#label());
    byId("upload-cancel").addEventListener("click", () => this.#sending?.abort());
    byId("upload-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#sending === null) this.#upload();
    });
    this.#acceptDrops(byId("drop"));
  }

  #find;
  #changed;
  #files = [];
  #sending = null; // the XMLHttpRequest of an upload

  #acceptDrops(zone) {
    for (const type of ["dragenter", "dragover"]) {
      zone.addEventListener(type, (event) => {
        event.preventDefault();
        zone.classList.add("over");
      });
    }
    zone.addEventListener("dragleave", () => zone.classList.remove("over"));
    zone.addEventListener("drop", async (event) => {
      event.preventDefault();
      zone.classList.remove("over");
      const { files, folder } = await dropped(event.dataTransfer);
      this.#choose(files, folder);
    });
  }

  #choose(files, folder = null) {
    const archive = files.length === 1 && ARCHIVES.some(([ending]) => ending.test(files[0].name));
    this.#files = archive ? files : files.filter(({ name }) => BUNDLE.includes(name));
    const listed = this.#files.map((file) => element("li", {}, `${file.name}, ${bytes(file.size)}`));
    const others = files.filter((file) => !this.#files.includes(file)).map((file) => file.name);
    if (others.length > 0) listed.push(element("li", { class: "quiet" }, `not needed: ${few(others)}`));
    byId("chosen").replaceChildren(...listed);
    const name = byId("upload-name");
    const suggested = folder ?? (archive ? files[0].name.replace(/\.(tar\.gz|tgz|tar)$/i, "") : "");
    if (name.value === "" && suggested) name.value = suggested.replace(/[^A-Za-z0-9._-]+/g, "-");
    this.#label();
  }

  #label() {
    byId("upload-button").textContent = this.#find(byId("upload-name").value) ? "Replace" : "Upload";
  }

  async #upload() {
    const name = byId("upload-name").value.trim();
    this.notices.clear();
    if (this.#files.length === 0) {
      this.notices.error(new Error(`choose ${BUNDLE[0]} and ${BUNDLE[1]}, or a .tar or .tar.gz of them`), "No files");
      return;
    }
    this.#show(true);
    try {
      const answer = await this.#send(name);
      const { digest, rank, warnings } = JSON.parse(answer);
      this.notices.say(`${name} is there: rank ${rank}, digest ${digest.slice(0, 12)}`);
      for (const warning of warnings) this.notices.say(warning);
      byId("upload-form").reset();
      this.#choose([]);
    } catch (error) {
      this.notices.error(error, `Uploading ${name}`);
    } finally {
      this.#show(false);
      this.#changed();
    }
  }

  /** Send the files; only XMLHttpRequest tells how far an upload is. Resolves to the answer's text. */
  #send(name) {
    const url = address("adapters", name);
    if (byId("upload-pin").checked) url.searchParams.set("pin", "true");
    if (byId("upload-ephemeral").checked) url.searchParams.set("ephemeral", "true");
    const request = new XMLHttpRequest();
    this.#sending = request;
    request.open("PUT", url);
    for (const [header, value] of Object.entries(headers(this.#condition(name)))) request.setRequestHeader(header, value);
    request.upload.addEventListener("progress", ({ loaded, total }) => this.#progress(loaded, total));
    return new Promise((resolve, reject) => {
      request.addEventListener("load", () => {
        if (request.status < 300) resolve(request.responseText);
        else reject(refusalOf(request.status, request.responseText, request.getResponseHeader("retry-after")));
      });
      request.addEventListener("error", () => reject(new Refusal(0, "the server does not answer, or has ended the upload")));
      request.addEventListener("abort", () => reject(new Error("cancelled; nothing was changed")));
      request.send(this.#body(request));
    });
  }

  /** Replace only what the table shows, and only that. */
  #condition(name) {
    const known = this.#find(name);
    if (known === undefined) return { "if-none-match": "*" };
    return known.digest === null ? {} : { "if-match": `"${known.digest}"` };
  }

  #body(request) {
    const [first] = this.#files;
    const archive = ARCHIVES.find(([ending]) => ending.test(first.name));
    if (archive) {
      request.setRequestHeader("content-type", archive[1]);
      return first;
    }
    const form = new FormData();
    for (const file of this.#files) form.append(file.name, file, file.name);
    return form;
  }

  #show(sending) {
    byId("upload-progress").hidden = !sending;
    byId("upload-cancel").hidden = !sending;
    byId("upload-button").setAttribute("aria-disabled", `${sending}`);
    if (sending) this.#progress(0, this.#files.reduce((sum, file) => sum + file.size, 0));
    else this.#sending = null;
  }

  #progress(loaded, total) {
    byId("upload-bar").value = total ? loaded / total : 0;
    const done = total && loaded >= total;
    byId("upload-text").textContent = done ? "sent; the server checks it" : `${bytes(loaded)} of ${bytes(total)}`;
  }
}

/** Some names, and how many more there are. */
function few(names) {
  const more = names.length - NAMED;
  return names.slice(0, NAMED).join(", ") + (more > 0 ? ` and ${more.toLocaleString("en")} more` : "");
}

/** The files that were dropped, those of a folder too, and the folder's name. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const folder = entries.find((entry) => entry.isDirectory);
  if (folder === undefined) return { files: [...transfer.files], folder: null };
  const reader = folder.createReader(), inside = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // a hundred at most
    if (some.length === 0) break;
    inside.push(...some);
  }
  const files = inside.filter((entry) => entry.isFile);
  const read = (entry) => new Promise((resolve, reject) => entry.file(resolve, reject));
  return { files: await Promise.all(files.map(read)), folder: folder.name };
}

export class ImportForm {
  constructor(changed) {
    this.notices = new Notices(byId("import-form"));
    byId("import-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      this.notices.clear();
      const name = byId("import-name").value.trim();
      const button = event.target.querySelector("button");
      const begun = await attempt(button, this.notices, `Importing ${name}`, () => begin(name));
      if (begun) {
        this.notices.say(`the import of ${name} has begun; the table shows its progress`);
        byId("import-form").reset();
      }
      changed();
    });
  }
}

function begin(name) {
  const url = address("adapters");
  url.searchParams.set("wait", "false");
  const body = { name, src: byId("import-source").value.trim() };
  const revision = byId("import-revision").value.trim();
  if (revision) body.revision = revision;
  if (byId("import-pin").checked) body.pin = true;
  return call("POST", url, { body });
}
