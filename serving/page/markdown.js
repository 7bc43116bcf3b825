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

const DEEPEST = 20; // lists and quotes within each other; what is deeper is text

const ordered = (item) => /\d/.test(item[2]);

// Whether line `i` goes on with a list whose first line is the item `first`. What is indented does,
// and so do empty lines before what does.
function goesOn(lines, first, i) {
  while (i < lines.length - 1 && !lines[i].trim()) i += 1;
  if (/^\s*$/.test(lines[i])) return false;
  const item = ITEM.exec(lines[i]);
  if (item && item[1].length <= first[1].length) return ordered(item) === ordered(first);
  return Boolean(item) || /^\s/.test(lines[i]);
}

// Splits a text into blocks: { kind, source, ... }. A block that is still being written is whole.
function blocks(text, depth = 0) {
  const lines = text.split("\n");
  const found = [];
  let at = 0;
  const take = (kind, end, more) => {
    found.push({ kind, source: lines.slice(at, end).join("\n"), ...more });
    at = end;
  };
  const run = (from, holds) => {
    let end = from;
    while (end < lines.length && holds(lines[end], end)) end += 1;
    return end;
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (!line.trim()) {
      at += 1;
    } else if (fence) {
      const close = run(at + 1, (l) => !(l.trim().startsWith(fence[1]) && !l.trim().slice(fence[1].length).trim()));
      const indent = new RegExp(`^ {0,${/^ */.exec(line)[0].length}}`);
      const body = lines.slice(at + 1, close).map((l) => l.replace(indent, "")).join("\n");
      take("code", Math.min(close + 1, lines.length), { body, language: fence[2] });
    } else if (RULE.test(line)) {
      take("rule", at + 1);
    } else if (HEADING.test(line)) {
      take("heading", at + 1);
    } else if (/^\s*>/.test(line) && depth < DEEPEST) {
      take("quote", run(at, (l) => /^\s*>/.test(l)));
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[at + 1] ?? "") && lines[at + 1].includes("|")) {
      take("table", run(at, (l) => l.includes("|")));
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const first = ITEM.exec(line);
      take("list", run(at + 1, (_, i) => goesOn(lines, first, i)));
    } else {
      take("paragraph", run(at + 1, (l) => l.trim() && !FENCE.test(l) && !ITEM.test(l) && !HEADING.test(l) && !/^\s*>/.test(l)));
    }
  }
  return found;
}

const SPANS = [
  [/(`+)(.+?)\1(?!`)/s, (m) => element("code", m[2].replace(/^ (.*) $/s, "$1"))],
  [/\\([*_`~#|<>+.!-])/, (m) => m[1]],
  [/ {2,}\n/, () => element("br")],
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
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(block.body);
    } else {
      // Over plain HTTP browsers have a clipboard only for what comes from this machine.
      getSelection().selectAllChildren(node.firstChild);
      document.execCommand("copy");
    }
    copy.textContent = "Copied";
  });
  node.append(copy);
  return node;
}

// A list. What is indented below an item is in it: text, code, and other lists.
function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const node = element(ordered(first) ? "ol" : "ul");
  if (node.localName === "ol") node.start = parseInt(first[2], 10);
  const items = [];
  let indent;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= first[1].length) {
      indent = new RegExp(`^\\s{0,${line.length - item[3].length}}`);
      items.push([item[3]]);
    } else {
      items.at(-1).push(line.replace(indent, ""));
    }
  }
  for (const item of items) {
    const [start, ...rest] = blocks(item.join("\n"), depth + 1);
    const text = start?.kind === "paragraph" ? spans(start.source) : start ? [made(start, depth + 1)] : [];
    node.append(element("li", ...text, ...rest.map((block) => made(block, depth + 1))));
  }
  return node;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const row = (line, kind) => element("tr", ...cells(line).map((cell) => element(kind, ...spans(cell))));
  return element("table", element("thead", row(lines[0], "th")), element("tbody", ...lines.slice(2).map((l) => row(l, "td"))));
}

function made(block, depth = 0) {
  const lines = block.source.split("\n");
  const inner = (l) => blocks(l.join("\n"), depth + 1).map((b) => made(b, depth + 1));
  switch (block.kind) {
    case "code": return code(block);
    case "rule": return element("hr");
    case "heading": {
      const [, marks, text] = HEADING.exec(lines[0]);
      return element(`h${Math.min(marks.length + 1, 4)}`, ...spans(text));
    }
    case "quote": return element("blockquote", ...inner(lines.map((l) => l.replace(/^\s*> ?/, ""))));
    case "table": return table(lines);
    case "list": return list(lines, depth);
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
    const node = made(block);
    node.markdown = key;
    if (old) old.replaceWith(node);
    else target.append(node);
  });
  while (target.childNodes.length > found.length) target.lastChild.remove();
}
