// Markdown as DOM nodes. Text is only ever put into text nodes and a few checked attributes, so
// whatever a model writes stays text: no HTML of its own, no images, no scripts.

const INLINE = new RegExp(
  [
    /(?<code>(?<ticks>`+)(?<coded>[\s\S]*?[^`])\k<ticks>(?!`))/,
    /(?<escaped>\\[\\`*_{}[\]()#+\-.!|<>~])/,
    /(?<link>!?\[(?<label>[^\]\n]*)\]\((?<target>[^\s)]+)(?:\s+"[^"\n]*")?\))/,
    /(?<bare>https?:\/\/[^\s<>()\[\]"'`]+[^\s<>()\[\]"'`.,;:!?])/,
    /(?<strong>(?:\*\*(?=\S)(?<bold>[\s\S]+?)(?<=\S)\*\*)|(?:(?<!\w)__(?=\S)(?<bold2>[\s\S]+?)(?<=\S)__(?!\w)))/,
    /(?<em>(?:\*(?=[^\s*])(?<slant>[^*\n]*?[^\s*])\*(?!\*))|(?:(?<!\w)_(?=[^\s_])(?<slant2>[^_\n]*?[^\s_])_(?!\w)))/,
    /(?<del>~~(?=\S)(?<gone>[\s\S]+?)(?<=\S)~~)/,
  ].map((part) => part.source).join("|"),
  "g",
);

function make(tag, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}

function inline(text, depth = 0) {
  if (depth > 8) return [document.createTextNode(text)];
  const nodes = [];
  let last = 0;
  for (const found of text.matchAll(INLINE)) {
    if (found.index > last) nodes.push(...lines(text.slice(last, found.index)));
    last = found.index + found[0].length;
    const part = found.groups;
    if (part.code) nodes.push(make("code", part.coded.trim() || part.coded));
    else if (part.escaped) nodes.push(document.createTextNode(part.escaped[1]));
    else if (part.link) nodes.push(link(part.target, part.label || part.target));
    else if (part.bare) nodes.push(link(part.bare, part.bare));
    else if (part.strong) nodes.push(make("strong", ...inline(part.bold ?? part.bold2, depth + 1)));
    else if (part.em) nodes.push(make("em", ...inline(part.slant ?? part.slant2, depth + 1)));
    else nodes.push(make("del", ...inline(part.gone, depth + 1)));
  }
  if (last < text.length) nodes.push(...lines(text.slice(last)));
  return nodes;
}

// a line end within a paragraph is one on the screen too
function lines(text) {
  return text.split("\n").flatMap((line, i) => (i ? [make("br"), line] : [line])).filter((one) => one !== "");
}

function link(target, label) {
  let address = null;
  try {
    address = new URL(target);
  } catch {
    // a relative address would point at this server
  }
  if (!address || !["http:", "https:", "mailto:"].includes(address.protocol)) return document.createTextNode(label);
  const node = make("a", label);
  node.href = address.href;
  node.rel = "noopener noreferrer nofollow";
  node.target = "_blank";
  return node;
}

function codeBlock(language, text) {
  const block = make("div");
  block.className = "code";
  const copy = make("button", "Copy");
  copy.type = "button";
  copy.className = "tool";
  copy.setAttribute("aria-label", "Copy the code");
  copy.addEventListener("click", () => copyText(text, copy));
  const head = make("div", make("span", language || "code"), copy);
  head.className = "code-head";
  const pre = make("pre", make("code", text));
  pre.tabIndex = 0;
  block.append(head, pre);
  return block;
}

export function copyText(text, button) {
  const told = (word) => {
    const before = button.textContent;
    button.textContent = word;
    setTimeout(() => { button.textContent = before; }, 1200);
  };
  if (!navigator.clipboard) return told("cannot copy here");
  navigator.clipboard.writeText(text).then(() => told("Copied"), () => told("not allowed"));
}

const cells = (row) => row.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

function table(rows) {
  const head = make("tr", ...cells(rows[0]).map((cell) => make("th", ...inline(cell))));
  const body = rows.slice(2).map((row) => make("tr", ...cells(row).map((cell) => make("td", ...inline(cell)))));
  const scroll = make("div", make("table", make("thead", head), make("tbody", ...body)));
  scroll.className = "scroll";
  return scroll;
}

const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;

// the lines of a list, whose items may hold blocks of their own
function list(rows, depth) {
  const first = rows[0].match(ITEM);
  const node = make(first[2] ? "ul" : "ol");
  if (first[3] && first[3] !== "1") node.start = Number(first[3]);
  let item = null;
  const close = () => { if (item) node.append(make("li", ...blocks(item, depth + 1, true))); };
  for (const row of rows) {
    const found = row.match(ITEM);
    if (found && found[1].length <= first[1].length + 1) {
      close();
      item = [found[4]];
    } else {
      item.push(row.replace(/^ {1,4}|^\t/, ""));
    }
  }
  close();
  return node;
}

function blocks(rows, depth = 0, tight = false) {
  const nodes = [];
  let paragraph = [];
  const flush = () => {
    if (!paragraph.length) return;
    const content = inline(paragraph.join("\n"));
    if (tight) nodes.push(...content);
    else nodes.push(make("p", ...content));
    paragraph = [];
  };
  for (let i = 0; i < rows.length; i++) {
    const row = rows[i];
    const fence = row.match(/^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/);
    const heading = row.match(/^(#{1,6})\s+(.*?)\s*#*$/);
    if (fence) {
      flush();
      const held = [];
      while (++i < rows.length && !rows[i].trim().startsWith(fence[1])) held.push(rows[i]);
      nodes.push(codeBlock(fence[2], held.join("\n")));
    } else if (!row.trim()) {
      flush();
    } else if (heading) {
      flush();
      nodes.push(make(`h${Math.min(6, heading[1].length + 2)}`, ...inline(heading[2])));
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(row)) {
      flush();
      nodes.push(make("hr"));
    } else if (/^\s*>/.test(row) && depth < 8) {
      flush();
      const held = [];
      while (i < rows.length && /^\s*>/.test(rows[i])) held.push(rows[i++].replace(/^\s*> ?/, ""));
      i--;
      nodes.push(make("blockquote", ...blocks(held, depth + 1)));
    } else if (ITEM.test(row) && depth < 8) {
      flush();
      const held = [row];
      const [, indent, bullet] = row.match(ITEM);
      const deep = indent.length;
      while (i + 1 < rows.length) {
        const next = rows[i + 1];
        const found = next.match(ITEM);
        if (found && found[1].length <= deep + 1 && Boolean(found[2]) !== Boolean(bullet)) break;
        const inside = next.length - next.trimStart().length > deep;
        const goes = found || inside || (!next.trim() && rows[i + 2] && (ITEM.test(rows[i + 2]) || /^\s{2,}/.test(rows[i + 2])));
        if (!goes) break;
        held.push(next);
        i++;
      }
      nodes.push(list(held, depth));
    } else if (row.includes("|") && /^[\s|:-]*-[\s|:-]*$/.test(rows[i + 1] ?? "") && rows[i + 1].includes("|")) {
      flush();
      const held = [];
      while (i < rows.length && rows[i].includes("|")) held.push(rows[i++]);
      i--;
      nodes.push(table(held));
    } else {
      paragraph.push(row);
    }
  }
  flush();
  return nodes;
}

export function markdown(text) {
  return blocks(text.replaceAll("\r\n", "\n").split("\n"));
}
