// Markdown as DOM nodes: the part of it that models write. Text only ever becomes text nodes, so
// nothing that a model says is run as HTML.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

// Splits a text into blocks: { kind, source, ... }. A block that is still being written is whole.
export function blocks(text) {
  const lines = text.split("\n");
  const found = [];
  let at = 0;
  const take = (kind, end, more) => {
    found.push({ kind, source: lines.slice(at, end).join("\n"), ...more });
    at = end;
  };
  const run = (from, holds) => {
    let end = from;
    while (end < lines.length && holds(lines[end])) end += 1;
    return end;
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (!line.trim()) {
      at += 1;
    } else if (fence) {
      const close = run(at + 1, (l) => !(l.trim().startsWith(fence[1]) && !l.trim().slice(fence[1].length).trim()));
      const body = lines.slice(at + 1, close).join("\n");
      take("code", Math.min(close + 1, lines.length), { body, language: fence[2] });
    } else if (RULE.test(line)) {
      take("rule", at + 1);
    } else if (HEADING.test(line)) {
      take("heading", at + 1);
    } else if (/^\s*>/.test(line)) {
      take("quote", run(at, (l) => /^\s*>/.test(l)));
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[at + 1] ?? "") && lines[at + 1].includes("|")) {
      take("table", run(at, (l) => l.includes("|")));
    } else if (ITEM.test(line)) {
      take("list", run(at, (l) => ITEM.test(l) || /^\s+\S/.test(l)));
    } else {
      take("paragraph", run(at + 1, (l) => l.trim() && !FENCE.test(l) && !ITEM.test(l) && !HEADING.test(l) && !/^\s*>/.test(l)));
    }
  }
  return found;
}

const SPANS = [
  [/(`+)(.+?)\1(?!`)/s, (m) => element("code", m[2].replace(/^ (.*) $/s, "$1"))],
  [/\[([^\]]*)\]\((https?:\/\/[^\s()<>]+)\)/, (m) => link(m[2], m[1])],
  [/\*\*(?=\S)(.+?)\*\*/s, (m) => element("strong", ...spans(m[1]))],
  [/(?<![\w*])\*(?=\S)([^*]+?)\*(?![\w*])/s, (m) => element("em", ...spans(m[1]))],
  [/(?<!\w)_(?=\S)([^_]+?)_(?!\w)/s, (m) => element("em", ...spans(m[1]))],
  [/~~(.+?)~~/s, (m) => element("del", ...spans(m[1]))],
  [/https?:\/\/[^\s<>()"']*[^\s<>()"'.,:;!?]/, (m) => link(m[0], m[0])],
];

function link(target, text) {
  const node = element("a", ...(text === target ? [text] : spans(text)));
  node.href = target;
  node.rel = "noopener noreferrer";
  node.target = "_blank";
  return node;
}

// The text of a line with its emphasis, code and links: the first that begins is taken.
function spans(text) {
  const nodes = [];
  while (text) {
    let first = null;
    for (const [pattern, make] of SPANS) {
      const match = pattern.exec(text);
      if (match && (!first || match.index < first.match.index)) first = { match, make };
    }
    if (!first) break;
    const { match, make } = first;
    if (match.index) nodes.push(text.slice(0, match.index));
    nodes.push(make(match));
    text = text.slice(match.index + match[0].length);
  }
  return text ? [...nodes, text] : nodes;
}

function code(block) {
  const node = element("pre", element("code", block.body));
  if (block.language) node.dataset.language = block.language;
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.body);
    copy.textContent = "Copied";
  });
  node.append(copy);
  return node;
}

// A list with those inside it: deeper indentation is a list in the last item.
function list(lines) {
  const first = ITEM.exec(lines[0]);
  const node = element(/\d/.test(first[2]) ? "ol" : "ul");
  if (node.localName === "ol") node.start = parseInt(first[2], 10);
  let inner = [];
  const close = () => {
    if (!inner.length) return;
    const item = node.lastElementChild;
    if (ITEM.test(inner[0])) item.append(list(inner));
    else item.append("\n", ...spans(inner.map((l) => l.trim()).join("\n")));
    inner = [];
  };
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= first[1].length) {
      close();
      node.append(element("li", ...spans(item[3])));
    } else {
      inner.push(line);
    }
  }
  close();
  return node;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, kind) => element("tr", ...cells(line).map((cell) => element(kind, ...spans(cell))));
  return element("table", element("thead", row(lines[0], "th")), element("tbody", ...lines.slice(2).map((l) => row(l, "td"))));
}

function node(block) {
  const lines = block.source.split("\n");
  switch (block.kind) {
    case "code": return code(block);
    case "rule": return element("hr");
    case "heading": {
      const [, marks, text] = HEADING.exec(lines[0]);
      return element(`h${Math.min(marks.length + 1, 4)}`, ...spans(text));
    }
    case "quote": return element("blockquote", ...blocks(lines.map((l) => l.replace(/^\s*> ?/, "")).join("\n")).map(node));
    case "table": return table(lines);
    case "list": return list(lines);
    default: return element("p", ...spans(block.source));
  }
}

// Shows a text in an element. Blocks that are as they were keep their nodes, so that a long answer
// costs the same for each piece, and what is selected stays selected.
export function render(text, target) {
  const found = blocks(text);
  found.forEach((block, i) => {
    const old = target.childNodes[i];
    const key = `${block.kind}\n${block.source}`;
    if (old && old.markdown === key) return;
    const made = node(block);
    made.markdown = key;
    if (old) old.replaceWith(made);
    else target.append(made);
  });
  while (target.childNodes.length > found.length) target.lastChild.remove();
}
