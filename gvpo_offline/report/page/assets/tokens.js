// Lower bounds of the colours of tokens, in nats; below the last one is the strongest colour.
const TOKEN_BOUNDS = [-0.1, -0.5, -1.5, -3, -6];
const CLAMPED = 26; // lines of a response before it is cut, as in page.css

function tokenLevel(logprob) {
  const level = TOKEN_BOUNDS.findIndex((bound) => logprob >= bound);
  return level < 0 ? TOKEN_BOUNDS.length : level;
}

/** The tokens of a response as spans, or its text where tokens have nothing to say. */
function responseText(response) {
  const box = el("div", { class: "words", dir: "auto" });
  if (!response.lengths) {
    box.append(response.text);
    return box;
  }
  const logprobs = response.logprobs?.split(",");
  const uncounted = new Set(response.uncounted);
  const special = new Set(response.special);
  let at = 0;
  response.lengths.split(",").forEach((length, i) => {
    const span = document.createElement("span");
    span.textContent = response.text.slice(at, (at += Number(length)));
    const steps = logprobs?.[i] ?? "";
    let look = steps === "" ? "" : `t${tokenLevel(steps / 100)}`;
    if (uncounted.has(i)) look += " uncounted";
    if (special.has(i)) look += " special";
    if (span.textContent.startsWith("\n")) look += " newline";
    if (look) span.className = look;
    box.append(span);
  });
  box.response = response;
  return box;
}

/** What is known of a token, beside the pointer: 4,000 attributes a group would take their time. */
function tokenTooltip(event) {
  const words = event.target.closest?.(".words");
  const at = words?.response && event.type === "mouseover" ? [...words.children].indexOf(event.target) : -1;
  if (at < 0) {
    showTooltip(event, null);
    return;
  }
  const { response } = words;
  const steps = response.logprobs?.split(",")[at] ?? "";
  const lines = [["token", String(at)], ["log-prob", steps === "" ? "none stored" : `${(steps / 100).toFixed(2)} nats`]];
  if (response.uncounted.includes(at)) lines.push(["loss mask", "not counted"]);
  if (response.special.includes(at)) lines.push(["special token", "yes"]);
  showTooltip(event, lines);
}

/** What the colours and marks of the tokens mean. */
function tokenLegend(group, coloured) {
  const some = (test) => group.responses.some(test);
  const items = [];
  if (coloured && some((response) => response.logprobs)) {
    const names = TOKEN_BOUNDS.map((bound) => `≥ ${bound}`).concat(`< ${TOKEN_BOUNDS.at(-1)}`);
    items.push(el("span", { class: "legend-title" }, "log-prob under the reference, nats:"));
    names.forEach((name, level) => items.push(el("span", { class: `swatch t${level}` }, name)));
  }
  if (some((response) => response.special?.length)) {
    items.push(el("span", { class: "special" }, "special token"));
  }
  if (some((response) => response.uncounted?.length)) {
    items.push(el("span", { class: "uncounted" }, "not counted: the loss mask leaves it out"));
  }
  return items.length ? el("p", { class: `legend${coloured ? " coloured" : ""}` }, ...items) : null;
}

/** Name and value pairs in one line. */
function facts(pairs) {
  return el(
    "dl",
    { class: "facts" },
    ...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
}

function responseCard(response, at) {
  const pairs = [];
  if (response.ref !== null) {
    pairs.push(["reference", `${shown(response.ref, 4)} nats`]);
    if (typeof response.ref === "number" && response.n) {
      pairs.push(["per token", shown(response.ref / response.n)]);
    }
  }
  if (response.n || !response.shown) pairs.push(["tokens", shown(response.n)]); // 0: not known
  for (const [name, value] of Object.entries(response.components)) pairs.push([name, shown(value)]);
  const words = el("div", { class: "clamp" }, responseText(response));
  const more = response.n > response.shown;
  return el(
    "article",
    { class: "response", "aria-label": `Response ${at + 1}, ${response.sampler}` },
    el(
      "header",
      {},
      el("span", { class: "reward" }, el("span", { class: "sr" }, "reward "), shown(response.reward)),
      el("span", { class: "sampler", dir: "auto" }, response.sampler),
      response.truncated ? el("span", { class: "chip warn", title: "cut at a limit of tokens" }, "truncated") : null,
    ),
    facts(pairs),
    words,
    more
      ? el("p", { class: "cut" }, `The first ${shown(response.shown)} of ${counted(response.n, "token")}.`)
      : null,
    response.shown || response.text ? null : el("p", { class: "cut" }, "No tokens."),
  );
}

/** Where a response is longer than its box: a button that shows all of it. */
function addExpanders(within) {
  for (const box of $$(".clamp", within)) {
    if (box.scrollHeight <= box.clientHeight + 4) continue;
    box.classList.add("cut-off");
    const button = el("button", { type: "button", class: "quiet expand", "aria-expanded": "false" }, "Show all");
    button.addEventListener("click", () => {
      const open = box.classList.toggle("open");
      button.textContent = open ? "Show less" : "Show all";
      button.setAttribute("aria-expanded", String(open));
    });
    box.after(button);
  }
}

/** Mark what was searched for in the shown group, where the browser can without new elements. */
function highlight(root, needle) {
  if (!("highlights" in CSS)) return;
  CSS.highlights.delete("search");
  if (!needle) return;
  const ranges = [];
  for (const box of $$(".words, .turn-text", root)) {
    const nodes = [];
    let text = "";
    const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      nodes.push([text.length, walker.currentNode]);
      text += walker.currentNode.data;
    }
    const place = (offset, end) => {
      let low = 0;
      let high = nodes.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (nodes[middle][0] < offset || (!end && nodes[middle][0] === offset)) low = middle;
        else high = middle - 1;
      }
      return [nodes[low][1], offset - nodes[low][0]];
    };
    const folded = text.toLowerCase();
    if (folded.length !== text.length) continue; // offsets would not fit
    for (let at = folded.indexOf(needle); at >= 0 && ranges.length < 500; at = folded.indexOf(needle, at + needle.length)) {
      const range = new Range();
      range.setStart(...place(at, false));
      range.setEnd(...place(at + needle.length, true));
      ranges.push(range);
    }
  }
  CSS.highlights.set("search", new Highlight(...ranges));
}
