// Requests to the endpoint: the key, errors in one sentence, waiting where it is busy, answers that stream.

const KEPT = "fmray-key";
const ATTEMPTS = 6;
const LONGEST_WAIT = 120;

export class Failure extends Error {
  /** What went wrong, in a sentence for people; `status` 0: nothing was answered. */
  constructor(message, status = 0, requestId = "") {
    super(message);
    this.status = status;
    this.requestId = requestId;
  }

  get sentence() {
    const text = this.message.trim();
    const begun = text.replace(/^[a-z](?=[a-z]* )/, (letter) => letter.toUpperCase()); // not where it names a parameter
    const whole = `${begun}${/[.!?]$/.test(begun) ? "" : "."}`;
    return this.requestId ? `${whole} (Request ${this.requestId})` : whole;
  }
}

// ----------------------------------------------------------------------------------------------------- the key

let key = stored("getItem") ?? "";

/** A browser that keeps nothing for pages throws here; the key is then only remembered until a reload. */
function stored(action, ...value) {
  try {
    return sessionStorage[action](KEPT, ...value);
  } catch {
    return null;
  }
}

export const access = {
  get known() {
    return key !== "";
  },
  use(text, keep) {
    key = text.trim();
    if (keep && key) stored("setItem", key);
    else stored("removeItem");
  },
};

// ---------------------------------------------------------------------------------------------------- requests

/** The answer, once it is a good one. `waiting(seconds)` counts down while the endpoint is busy. Throws Failure. */
export async function request(url, { body, signal, waiting = () => {} } = {}) {
  for (let attempt = 1; ; attempt += 1) {
    const response = await send(url, body, signal);
    if (response.ok) return response;
    const failure = await failureOf(response);
    const seconds = secondsToWait(response);
    if (seconds === null || seconds > LONGEST_WAIT || attempt === ATTEMPTS) throw failure;
    await countDown(seconds, signal, waiting);
  }
}

export async function json(url, options) {
  const response = await request(url, options);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("the answer cannot be read: it broke off, or it is not the endpoint's", response.status, idOf(response));
  }
}

async function send(url, body, signal) {
  const headers = { accept: "application/json, text/event-stream" };
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  try {
    return await fetch(url, {
      method: body === undefined ? "GET" : "POST",
      body: body === undefined ? undefined : JSON.stringify(body),
      headers,
      signal,
      credentials: "same-origin",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(
      error instanceof TypeError && key && !/^[\x20-\x7e]*$/.test(key)
        ? "this cannot be a key: keys have no letters beyond ASCII"
        : "the endpoint cannot be reached",
      0,
    );
  }
}

async function failureOf(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    // not the endpoint's own answer: a proxy's page, which says nothing to a reader
  }
  return new Failure(message || `the server answered ${response.status}`, response.status, idOf(response));
}

function idOf(response) {
  return response.headers.get("x-request-id") ?? "";
}

function secondsToWait(response) {
  if (response.status !== 429 && response.status !== 503) return null;
  const told = response.headers.get("retry-after");
  const seconds = Number(told);
  return told === null || !Number.isFinite(seconds) ? null : Math.max(1, Math.ceil(seconds));
}

async function countDown(seconds, signal, waiting) {
  for (let left = seconds; left > 0; left -= 1) {
    waiting(left);
    await new Promise((resolve, reject) => {
      const timer = setTimeout(done, 1000);
      function done() {
        clearTimeout(timer);
        signal?.removeEventListener("abort", done);
        if (signal?.aborted) reject(signal.reason);
        else resolve();
      }
      signal?.addEventListener("abort", done);
      if (signal?.aborted) done();
    });
  }
  waiting(0);
}

// ------------------------------------------------------------------------------------------------------ streams

/** The chunks of a streamed answer. Throws Failure where it ends in an error, or without its `[DONE]`. */
export async function* chunks(response) {
  const id = idOf(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await read(reader, id);
      if (done) throw new Failure("the answer broke off", 0, id);
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data:")) continue;
        const data = event.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Failure(chunk.error.message, response.status, id);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already, which was told
  }
}

async function read(reader, id) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("the answer broke off", 0, id);
  }
}
