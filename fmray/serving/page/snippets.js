// The request that a panel would send, as a shell's or Python's lines that anybody can run.

import { Picture } from "./pictures.js";

const CHAT = "chat/completions";

/** `base`: where the API begins (`https://host/clip/v1/`); pictures are read from files of their names. */
export function curl(base, route, body, keyed) {
  const files = [];
  const held = JSON.stringify(withPictures(body, (picture) => `\u0000${files.push(picture.name) - 1}\u0000`), null, 2);
  const text = held
    .replace(/[\\$`]/g, "\\$&")
    .replace(/\\\\u0000(\d+)\\\\u0000/g, (_, place) => `data:${mime(files[place])};base64,$(base64 < ${quoted(files[place])} | tr -d '\\n')`);
  return [
    `curl ${body.stream ? "-N " : ""}${quoted(base + route)} \\`,
    ...(keyed ? ['  -H "Authorization: Bearer $FMRAY_KEY" \\'] : []),
    "  -H 'Content-Type: application/json' \\",
    "  -d @- <<END",
    text,
    "END",
  ].join("\n");
}

export function python(base, route, body, keyed) {
  const chat = route === CHAT;
  let pictures = false;
  const spell = (picture) => {
    pictures = true;
    return new Code(`picture(${JSON.stringify(picture.name)})`);
  };
  const spelled = withPictures(body, spell);
  const key = keyed ? 'os.environ["FMRAY_KEY"]' : '"none"';
  const modules = [...(pictures ? ["base64", "mimetypes"] : []), ...(keyed ? ["os"] : [])];
  const lines = modules.sort().map((name) => `import ${name}`);
  lines.push(...(lines.length ? [""] : []), chat ? "from openai import OpenAI" : "import httpx", "");
  if (pictures) lines.push(...READ_PICTURE);
  if (chat) {
    lines.push(`client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${key})`, "answer = client.chat.completions.create(");
    for (const [name, value] of Object.entries(spelled)) lines.push(`    ${name}=${literal(value, 1)},`);
    lines.push(")", "for chunk in answer:", "    if chunk.choices:");
    lines.push('        print(chunk.choices[0].delta.content or "", end="", flush=True)');
  } else {
    lines.push("reply = httpx.post(", `    ${JSON.stringify(base + route)},`, `    json=${literal(spelled, 1)},`);
    if (keyed) lines.push(`    headers={"Authorization": f"Bearer {${key.replaceAll('"', "'")}}"},`);
    lines.push("    timeout=60,", ")", "print(reply.raise_for_status().json())");
  }
  return lines.join("\n");
}

const READ_PICTURE = [
  "",
  "def picture(path):",
  "    kind = mimetypes.guess_type(path)[0]",
  '    with open(path, "rb") as file:',
  '        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"',
  "",
  "",
];

class Code {
  constructor(text) {
    this.text = text;
  }
}

/** The same value with every Picture in it spelled in some way. */
export function withPictures(value, spell) {
  if (value instanceof Picture) return spell(value);
  if (Array.isArray(value)) return value.map((each) => withPictures(each, spell));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, withPictures(each, spell)]));
}

/** A value as Python writes it. */
function literal(value, depth) {
  if (value instanceof Code) return value.text;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const [open, close] = isList ? "[]" : "{}";
  const entries = isList
    ? value.map((each) => literal(each, depth + 1))
    : Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each, depth + 1)}`);
  const flat = `${open}${entries.join(", ")}${close}`;
  if (flat.length <= 70 && !flat.includes("\n")) return flat;
  const indent = "    ".repeat(depth);
  return `${open}\n${entries.map((entry) => `${indent}    ${entry},\n`).join("")}${indent}${close}`;
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

const KINDS = { jpg: "jpeg", jpeg: "jpeg", webp: "webp", gif: "gif", bmp: "bmp" };

function mime(name) {
  return `image/${KINDS[name.split(".").at(-1).toLowerCase()] ?? "png"}`;
}
