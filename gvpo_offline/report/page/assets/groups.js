/** The groups to read: a list, and the one that is shown. Only that one is in the document. */
class Reader {
  constructor(root) {
    this.root = root;
    this.coloured = true;
    this.choice = { search: "", sampler: "", flag: "", sort: "", descending: true };
    this.build();
    this.load();
  }

  /** Read the groups of the page. */
  load() {
    const kept = this.selected;
    this.groups = JSON.parse($("#groups_data").textContent);
    this.groups.forEach((group, i) => {
      if (group.id === kept?.id) group.source = JSON.stringify(group); // before anything is added
      group.at = i;
      group.tokens = group.responses.reduce((sum, response) => sum + response.n, 0);
    });
    this.fillChoices();
    this.apply();
    const same = this.groups.find((group) => group.id === kept?.id);
    if (same && same.source === kept.source) this.selected = same; // what is shown may stay
    this.show(same ?? this.found[0] ?? null);
  }

  /** A group as it came. */
  raw(group) {
    const { at, tokens, text, source, ...rest } = group;
    return rest;
  }

  build() {
    const select = (key, label) => {
      const node = el("select", { id: `by_${key}`, onchange: () => this.change({ [key]: node.value }) });
      this[key] = node;
      return el("label", {}, el("span", {}, label), node);
    };
    this.search = el("input", {
      type: "search", id: "search_box", placeholder: "Search texts and ids", autocomplete: "off", spellcheck: "false",
      oninput: () => this.change({ search: this.search.value.toLowerCase() }),
    });
    this.direction = el("button", {
      type: "button", class: "quiet", id: "sort_direction",
      onclick: () => this.change({ descending: !this.choice.descending }),
    });
    this.count = el("p", { class: "count", role: "status" });
    this.list = el("ol", { class: "group-list", "aria-label": "Groups" });
    this.detail = el("div", { class: "group", id: "group_shown", tabindex: "-1" });
    this.root.replaceChildren(
      el(
        "form",
        { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
        el("label", { class: "grow" }, el("span", {}, "Search"), this.search),
        select("sampler", "Sampler"),
        select("flag", "Found"),
        el("div", { class: "with-button" }, select("sort", "Sort by"), this.direction),
      ),
      el("div", { class: "reader" }, el("div", { class: "side" }, this.count, this.list), this.detail),
    );
    for (const event of ["mouseover", "mouseout"]) this.detail.addEventListener(event, tokenTooltip);
    this.list.addEventListener("click", (event) => {
      const link = event.target.closest("a");
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      this.show(this.groups[Number(link.dataset.at)]);
    });
  }

  /** The values that filters and sorting offer. */
  fillChoices() {
    const fill = (key, values, none) => {
      this[key].replaceChildren(
        el("option", { value: "" }, none),
        ...values.map(([value, text]) => el("option", { value }, text)),
      );
      if (!values.some(([value]) => value === this.choice[key])) this.choice[key] = "";
      this[key].value = this.choice[key];
    };
    const tally = (names) => {
      const counts = new Map();
      for (const name of names) counts.set(name, (counts.get(name) ?? 0) + 1);
      return [...counts].sort((a, b) => a[0].localeCompare(b[0], "en", { numeric: true }))
        .map(([name, n]) => [name, `${name} (${n})`]);
    };
    fill("sampler", tally(this.groups.flatMap((g) => [...new Set(g.responses.map((r) => r.sampler))])), "all");
    fill("flag", tally(this.groups.flatMap((g) => [...new Set(g.flags)])), "anything");
    const numbers = [...new Set(this.groups.flatMap((g) => Object.keys(g.numbers)))];
    fill("sort", [...numbers.map((name) => [`n:${name}`, name]), ["tokens", "tokens"], ["id", "group id"]], "order of the page");
  }

  change(choice) {
    Object.assign(this.choice, choice);
    this.apply();
    if (!this.found.includes(this.selected)) this.show(this.found[0] ?? null);
    else this.mark();
  }

  text(group) {
    group.text ??= [
      group.id, group.place, ...group.flags, ...group.prompt.flat(),
      ...group.responses.flatMap((response) => [response.sampler, response.text]),
    ].join("\n").toLowerCase();
    return group.text;
  }

  number(group) {
    const { sort } = this.choice;
    const value = sort === "tokens" ? group.tokens : group.numbers[sort.slice(2)];
    return typeof value === "number" ? value : isSpecial(value) && !value.includes("nan") ? (value.includes("-") ? -Infinity : Infinity) : null;
  }

  /** Filter, sort, and write the list. */
  apply() {
    const { search, sampler, flag, sort, descending } = this.choice;
    this.found = this.groups.filter(
      (group) =>
        (!sampler || group.responses.some((response) => response.sampler === sampler)) &&
        (!flag || group.flags.includes(flag)) &&
        (!search || this.text(group).includes(search)),
    );
    const sign = descending ? -1 : 1;
    const byNumber = (a, b) => {
      const [x, y] = [this.number(a), this.number(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return x === y ? 0 : sign * (x < y ? -1 : 1);
    };
    if (sort === "id") this.found.sort((a, b) => sign * a.id.localeCompare(b.id, "en", { numeric: true }));
    else if (sort) this.found.sort(byNumber);
    else if (!descending) this.found.reverse();
    const [all, some] = [this.groups.length, this.found.length];
    this.count.textContent = some === all ? counted(all, "group") : `${shown(some)} of ${counted(all, "group")}`;
    this.direction.textContent = descending ? "↓" : "↑";
    const direction = !sort ? (descending ? "as in the page" : "reversed") : descending ? "largest first" : "smallest first";
    this.direction.title = direction;
    this.direction.setAttribute("aria-label", `Direction: ${direction}`);
    this.list.replaceChildren(...this.found.map((group) => this.item(group)));
    this.mark();
  }

  item(group) {
    const { sort } = this.choice;
    const key = sort && sort !== "id" ? sort : null;
    const value = key === "tokens" ? group.tokens : key ? group.numbers[key.slice(2)] : null;
    return el(
      "li",
      {},
      el(
        "a",
        { href: `#group=${encodeURIComponent(group.id)}`, "data-at": group.at },
        el("span", { class: "id" }, group.id),
        el("span", { class: "meta" }, key ? `${key.replace(/^n:/, "")} ${shown(value)}` : counted(group.responses.length, "response")),
        group.flags.length ? el("span", { class: "flags" }, group.flags.join(" · ")) : null,
      ),
    );
  }

  /** Mark the shown group in the list, and bring its entry into the list's view. */
  mark() {
    for (const link of $$("a", this.list)) {
      const here = this.selected !== null && Number(link.dataset.at) === this.selected?.at;
      if (here) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
      if (here) {
        const [item, list] = [link.getBoundingClientRect(), this.list.getBoundingClientRect()];
        if (item.top < list.top) this.list.scrollTop -= list.top - item.top;
        else if (item.bottom > list.bottom) this.list.scrollTop += item.bottom - list.bottom;
      }
    }
    const at = this.found.indexOf(this.selected);
    const place = $(".position", this.detail);
    if (place) place.textContent = at < 0 ? "" : `${shown(at + 1)} of ${shown(this.found.length)}`;
    highlight(this.detail, this.choice.search);
  }

  /** Show a group; null shows that there is none. */
  show(group, { remember = true } = {}) {
    const again = group !== null && group === this.selected;
    this.selected = group;
    if (group) group.source ??= JSON.stringify(this.raw(group));
    if (!again) this.write();
    if (remember && group && this.started) {
      history.replaceState(null, "", `#group=${encodeURIComponent(group.id)}`);
    }
    this.mark();
  }

  write() {
    const group = this.selected;
    if (!group) {
      this.detail.replaceChildren(el("p", { class: "empty" }, "No group matches the search and filters."));
      return;
    }
    const step = (by, label, sign) =>
      el("button", { type: "button", class: "quiet", "aria-label": label, title: `${label} (${by > 0 ? "j" : "k"})`, onclick: () => this.move(by) }, sign);
    const toggle = el("input", { type: "checkbox", id: "colour_tokens", onchange: () => this.colour(toggle.checked) });
    toggle.checked = this.coloured;
    const hasLogprobs = group.responses.some((response) => response.logprobs);
    const numbers = Object.entries(group.numbers).map(([name, value]) => [name, shown(value)]);
    this.detail.replaceChildren(
      el(
        "div",
        { class: "group-head" },
        el("h3", {}, group.id),
        el("span", { class: "steps" }, el("span", { class: "position" }), step(-1, "Previous group", "←"), step(1, "Next group", "→")),
      ),
      el("p", { class: "place" }, group.place),
      ...(group.flags.length
        ? [el("p", { class: "chips" }, ...group.flags.map((flag) =>
            el("button", { type: "button", class: "chip", title: "Show only groups with this", onclick: () => this.filter({ flag }) }, flag)))]
        : []),
      ...(numbers.length ? [facts(numbers)] : []),
      el("div", { class: "prompt", role: "group", "aria-label": "Prompt" }, ...group.prompt.map(([role, text]) =>
        el("div", { class: `turn${role === "assistant" ? " assistant" : ""}` }, el("span", { class: "role" }, role || "prompt"), el("div", { class: "turn-text", dir: "auto" }, text)))),
      ...(hasLogprobs ? [el("label", { class: "check" }, toggle, "Colour tokens by their log-prob")] : []),
      el("div", { class: "legend-place" }),
      el("div", { class: "responses" }, ...group.responses.map(responseCard)),
    );
    this.colour(this.coloured);
    addExpanders(this.detail);
  }

  colour(on) {
    this.coloured = on;
    const box = $("#colour_tokens", this.detail);
    if (box) box.checked = on;
    $(".responses", this.detail)?.classList.toggle("coloured", on);
    const legend = this.selected && tokenLegend(this.selected, on);
    $(".legend-place", this.detail)?.replaceChildren(...(legend ? [legend] : []));
  }

  move(by) {
    if (!this.found.length) return;
    const at = this.found.indexOf(this.selected);
    const next = this.found[Math.min(Math.max(at + by, 0), this.found.length - 1)];
    this.show(next);
    const top = this.detail.getBoundingClientRect().top;
    if (top < 0 || top > innerHeight * 0.7) this.detail.scrollIntoView({ block: "start" });
  }

  /** Set filters from elsewhere in the page: everything else is shown. */
  filter(choice) {
    Object.assign(this.choice, { search: "", sampler: "", flag: "" }, choice);
    this.search.value = this.choice.search;
    this.sampler.value = this.choice.sampler;
    this.flag.value = this.choice.flag;
    this.change({});
  }

  /** Follow an address such as #group=ID or #flag=NAME; returns whether it is one. */
  follow(hash) {
    const parameters = new URLSearchParams(hash.slice(1).replaceAll("+", "%2B"));
    const [id, flag] = [parameters.get("group"), parameters.get("flag")];
    if (id === null && flag === null) return false;
    if (flag !== null && this.groups.some((group) => group.flags.includes(flag))) this.filter({ flag });
    const group = this.groups.find((one) => one.id === id);
    if (group) {
      if (!this.found.includes(group)) this.filter({});
      this.show(group, { remember: false });
    }
    (group ? this.detail : this.root).scrollIntoView({ block: "start" });
    return true;
  }
}
