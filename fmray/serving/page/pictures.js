// The pictures of this tab: chosen, dropped or pasted; made small enough to send; one of them is looked at.

import { Failure } from "./api.js";

const LONGEST_SIDE = 1024;
const MOST_BYTES = 700 * 1024;
const SENT_AS_THEY_ARE = new Set(["image/png", "image/jpeg", "image/webp"]);

const at = (id) => document.getElementById(id);

export class Picture {
  /** `url`: for showing it; `data`: a `data:` URL, for sending it. */
  constructor(name, size, url, data) {
    this.name = name;
    this.size = size;
    this.url = url;
    this.data = data;
  }
}

/** A file as a Picture, at most 1,024 pixels wide and high, the right way up. Throws Failure. */
export async function readPicture(file) {
  const name = file.name || "picture.png";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Failure(`${name} is not a picture that this browser can read`);
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const fits = scale === 1 && file.size <= MOST_BYTES && SENT_AS_THEY_ARE.has(file.type);
  const blob = fits ? file : await redrawn(bitmap, scale, file.type !== "image/jpeg");
  bitmap.close();
  return new Picture(name, [width, height], URL.createObjectURL(blob), await dataUrl(blob));
}

/** PNG where something may be transparent and it stays small; else JPEG, on white. */
async function redrawn(bitmap, scale, mayBeClear) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const encoded = (type) => new Promise((resolve) => { canvas.toBlob(resolve, type, 0.92); });
  if (mayBeClear) {
    const png = await encoded("image/png");
    if (png && png.size <= MOST_BYTES) return png;
  }
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  return encoded("image/jpeg");
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Failure("the picture's file cannot be read"));
    reader.readAsDataURL(blob);
  });
}

// ----------------------------------------------------------------------------------------------------- the tray

export class Tray extends EventTarget {
  /** All pictures, and the one that is looked at; tells `change`. */
  pictures = [];
  chosen = null;

  constructor(tell, complain) {
    super();
    this.tell = tell;
    this.complain = complain;
    at("files").addEventListener("change", (event) => {
      this.add([...event.target.files]);
      event.target.value = "";
    });
    document.addEventListener("paste", (event) => this.add([...event.clipboardData.files]));
    this.#watchDrops();
  }

  /** Files that cannot be read are named; the others are there. */
  async add(files) {
    if (!files.length) return;
    this.complain("");
    const read = await Promise.allSettled(files.map(readPicture));
    const added = read.filter((each) => each.status === "fulfilled").map((each) => each.value);
    const wrong = read.find((each) => each.status === "rejected");
    if (added.length) {
      this.pictures.push(...added);
      this.chosen = added.at(-1);
      this.tell(added.length === 1 ? `${added[0].name} is there` : `${added.length} pictures are there`);
      this.#changed();
    }
    if (wrong) this.complain(wrong.reason);
  }

  remove(picture) {
    const place = this.pictures.indexOf(picture);
    this.pictures.splice(place, 1);
    if (this.chosen === picture) this.chosen = this.pictures[Math.min(place, this.pictures.length - 1)] ?? null;
    this.tell(`${picture.name} is gone`);
    this.#changed();
    (at("thumbs").querySelector(":checked") ?? at("files")).focus();
  }

  #changed() {
    const { chosen, pictures } = this;
    at("preview").hidden = !chosen;
    at("tray").hidden = !chosen;
    at("about-picture").textContent = chosen ? `${chosen.name}, ${chosen.size.join(" × ")} pixels` : "";
    if (chosen) {
      at("preview").src = chosen.url;
      at("preview").alt = chosen.name;
    }
    at("thumbs").replaceChildren(...pictures.map((picture, place) => this.#thumb(picture, place)));
    this.dispatchEvent(new Event("change"));
  }

  #thumb(picture, place) {
    const [item, label, image] = ["li", "label", "img"].map((tag) => document.createElement(tag));
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "chosen", id: `picture-${place}` });
    radio.checked = picture === this.chosen;
    radio.addEventListener("change", () => {
      this.chosen = picture;
      this.#changed();
      at(radio.id).focus();
    });
    label.htmlFor = radio.id;
    Object.assign(image, { src: picture.url, alt: picture.name });
    label.append(image);
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `Remove ${picture.name}`);
    remove.addEventListener("click", () => this.remove(picture));
    item.append(radio, label, remove);
    return item;
  }

  #watchDrops() {
    let depth = 0;
    const mark = (change) => {
      depth = change === 0 ? 0 : depth + change;
      at("well").classList.toggle("over", depth > 0);
    };
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragenter", (event) => { if (hasFiles(event)) mark(1); });
    document.addEventListener("dragleave", (event) => { if (hasFiles(event)) mark(-1); });
    document.addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
    document.addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      mark(0);
      this.add([...event.dataTransfer.files]);
    });
  }
}
