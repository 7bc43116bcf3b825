import { render } from "/page/markdown.js";

const at = (id) => document.getElementById(id);
const messages = at("messages");
const settings = at("settings");
const input = at("input");

let turns = []; // { role, content, reasoning_content? }, as the server takes them
let running = null; // the AbortController of the answer that is being written

// In less time it says more of the connection than of the server how far apart chunks come.
const MEASURABLE_MS = 50;

// --- settings: kept in this browser; the key only until the tab is closed ---

function restore() {
  const kept = JSON.parse(localStorage.getItem("settings") ?? "{}");
  for (const field of settings.elements) {
    if (field.name === "key") field.value = sessionStorage.getItem("key") ?? "";
    else if (field.type === "checkbox") field.checked = kept[field.name] ?? true;
    else field.value = kept[field.name] ?? "";
  }
}

function keep() {
  const kept = {};
  for (const field of settings.elements) {
    if (field.name === "key") sessionStorage.setItem("key", field.value);
    else kept[field.name] = field.type === "checkbox" ? field.checked : field.value;
  }
  localStorage.setItem("settings", JSON.stringify(kept));
}

function headers() {
  const key = settings.elements.key.value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function request() {
  const { system, thinking } = settings.elements;
  const body = {
    messages: [...(system.value.trim() ? [{ role: "system", content: system.value }] : []), ...turns],
    stream: true,
    stream_options: { include_usage: true },
    chat_template_kwargs: { enable_thinking: thinking.checked },
  };
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    const { value } = settings.elements[name];
    if (value !== "") body[name] = Number(value);
  }
  return body;
}

// --- messages ---

function element(name, className, text = "") {
  const node = document.createElement(name);
  node.className = className;
  node.textContent = text;
  return node;
}

function atEnd() {
  return messages.scrollHeight - messages.scrollTop - messages.clientHeight < 60;
}

// Changes what is shown; who reads the end keeps reading the end.
function show(change) {
  const follow = atEnd();
  change();
  if (follow) messages.scrollTop = messages.scrollHeight;
}

function addUser(text) {
  const message = element("article", "message user");
  message.append(element("div", "body", text));
  messages.append(message);
  messages.scrollTop = messages.scrollHeight;
}

// An answer on the page, drawn at most once a frame.
class Answer {
  constructor() {
    this.content = this.reasoning = "";
    this.node = element("article", "message assistant");
    this.details = element("details", "reasoning");
    this.details.append(element("summary", "", "Thinking"), element("div", ""));
    this.details.hidden = true;
    this.body = element("div", "body");
    this.node.append(this.details, this.body);
    messages.append(this.node);
    this.started = performance.now();
    this.first = this.last = null;
    this.tokens = this.chunks = 0;
  }

  // A chunk has come. The first comes with the first token, be there something to see or not.
  arrived() {
    this.last = performance.now();
    this.first ??= this.last;
  }

  add({ content = "", reasoning_content = "" }) {
    if (!content && !reasoning_content) return;
    this.chunks += 1;
    this.content += content;
    this.reasoning += reasoning_content;
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = null;
    show(() => {
      this.details.hidden = !this.reasoning;
      this.details.lastChild.textContent = this.reasoning;
      this.details.firstChild.textContent = this.content || this.ended ? "Thoughts" : "Thinking …";
      render(this.content, this.body);
    });
  }

  end(note) {
    this.ended = true;
    if (this.frame) cancelAnimationFrame(this.frame);
    this.draw();
    show(() => this.node.append(element("div", "speed", [...(note ? [note] : []), ...this.figures()].join(" · "))));
  }

  // How many tokens there were, and how fast. An answer that was stopped was not counted by the
  // server; each of its chunks has a token or more.
  figures() {
    if (this.first === null) return [];
    const count = this.tokens || this.chunks;
    const parts = [
      `${this.tokens ? "" : "at least "}${count} ${count === 1 ? "token" : "tokens"}`,
      `first after ${Math.round(this.first - this.started)} ms`,
    ];
    const taken = this.last - this.first;
    if (count > 1 && taken >= MEASURABLE_MS) parts.push(`${((1000 * (count - 1)) / taken).toFixed(1)} tokens/s`);
    else if (count > 1) parts.push(`last after ${Math.round(this.last - this.started)} ms`);
    return parts;
  }

  fail(text) {
    show(() => this.node.append(element("div", "fault", text)));
  }
}

// --- the server ---

// The payloads of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off");
    buffer += value;
    const lines = buffer.split("\n\n");
    buffer = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// `fetch`, which rejects with other words in each browser.
async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached");
  }
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

async function answer() {
  running = new AbortController();
  at("send").hidden = true;
  at("stop").hidden = false;
  const shown = new Answer();
  const conversation = turns; // which "New chat" replaces
  let note = "";
  try {
    const options = { method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal };
    const response = await reach("/v1/chat/completions", options);
    if (!response.ok) throw new Error(await failure(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      shown.arrived();
      if (chunk.usage) shown.tokens = chunk.usage.completion_tokens;
      for (const choice of chunk.choices) {
        shown.add(choice.delta);
        if (choice.finish_reason === "length") note = "cut off";
      }
    }
  } catch (error) {
    if (error.name === "AbortError") note = "stopped";
    else shown.fail(error.message);
  }
  shown.end(note);
  if (shown.content || shown.reasoning) {
    conversation.push({ role: "assistant", content: shown.content, reasoning_content: shown.reasoning });
  } else {
    // What was not answered can be sent again, and is no part of the conversation.
    const { content } = conversation.pop();
    if (conversation === turns) input.value ||= content;
  }
  running = null;
  at("send").hidden = false;
  at("stop").hidden = true;
}

async function showModel() {
  try {
    const response = await reach("/v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await failure(response));
    const { data } = await response.json();
    at("model").textContent = document.title = data[0].id;
  } catch (error) {
    at("model").textContent = error.message;
  }
}

// --- what people do ---

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (!text || running) return;
  input.value = "";
  turns.push({ role: "user", content: text });
  addUser(text);
  answer();
});

input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("composer").requestSubmit();
  }
});

at("stop").addEventListener("click", () => running?.abort());

at("new").addEventListener("click", () => {
  running?.abort();
  turns = [];
  messages.replaceChildren();
  input.focus();
});

at("show-settings").addEventListener("click", () => {
  settings.hidden = !settings.hidden;
  at("show-settings").setAttribute("aria-expanded", String(!settings.hidden));
});

settings.addEventListener("change", () => {
  keep();
  showModel();
});
settings.addEventListener("submit", (event) => event.preventDefault());

restore();
showModel();
