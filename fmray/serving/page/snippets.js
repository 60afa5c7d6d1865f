// The request that a panel would send, as a shell's or Python's lines that anybody can run.

import { Picture } from "./pictures.js";

const CHAT = "chat/completions";
const ONE_LINE = 76;

/** `base`: where the API begins (`https://host/clip/v1/`); pictures are read from files of their names. */
export function curl(base, route, body, keyed) {
  const files = [];
  const held = withPictures(body, (picture) => `\u0000${files.push(picture.name) - 1}\u0000`);
  const text = literal(held, JSON_WORDS, "  ", 0)
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
    for (const [name, value] of Object.entries(spelled)) lines.push(`    ${name}=${literal(value, PYTHON_WORDS, "    ", 1)},`);
    lines.push(")", "for chunk in answer:", "    if chunk.choices:");
    lines.push('        print(chunk.choices[0].delta.content or "", end="", flush=True)');
  } else {
    lines.push("reply = httpx.post(", `    ${JSON.stringify(base + route)},`, `    json=${literal(spelled, PYTHON_WORDS, "    ", 1)},`);
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

const JSON_WORDS = { true: "true", false: "false", null: "null" };
const PYTHON_WORDS = { true: "True", false: "False", null: "None" };

/** A value as JSON or Python writes it, short lists and objects on one line. */
function literal(value, words, indent, depth) {
  if (value instanceof Code) return value.text;
  if (value === null || typeof value === "boolean") return words[value];
  if (typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const inner = (each) => literal(each, words, indent, depth + 1);
  const entries = Array.isArray(value)
    ? value.map(inner)
    : Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${inner(each)}`);
  const flat = `${open}${entries.join(", ")}${close}`;
  if (flat.length <= ONE_LINE && !flat.includes("\n")) return flat;
  const [outside, inside] = [indent.repeat(depth), indent.repeat(depth + 1)];
  return `${open}\n${inside}${entries.join(`,\n${inside}`)}\n${outside}${close}`;
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

const KINDS = { jpg: "jpeg", jpeg: "jpeg", webp: "webp", gif: "gif", bmp: "bmp" };

function mime(name) {
  return `image/${KINDS[name.split(".").at(-1).toLowerCase()] ?? "png"}`;
}
