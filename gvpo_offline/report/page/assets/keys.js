function startKeys(reader) {
  const help = $("#keys_help");
  const editing = (node) => node.matches?.("input:not([type=checkbox]), textarea, select, [contenteditable]");
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && reader && event.target === reader.search) {
      reader.search.value = "";
      reader.change({ search: "" });
      reader.search.blur();
      return;
    }
    if (help.open || editing(event.target)) return;
    const inList = reader && reader.list.contains(document.activeElement);
    const actions = {
      "?": () => help.showModal(),
      d: switchTheme,
      ...(reader && {
        j: () => reader.move(1),
        k: () => reader.move(-1),
        c: () => reader.colour(!reader.coloured),
        "/": () => {
          reader.search.focus();
          reader.search.select();
        },
      }),
      ...(inList && { ArrowDown: () => reader.move(1), ArrowUp: () => reader.move(-1) }),
    };
    const action = Object.hasOwn(actions, event.key) ? actions[event.key] : null;
    if (!action) return;
    event.preventDefault();
    action();
    if (inList && event.key !== "/") $("[aria-current]", reader.list)?.focus({ preventScroll: true });
  });
  $("#help_open").addEventListener("click", () => help.showModal());
}

/** Mark the section that is being read in the bar. */
function followSections() {
  const links = new Map($$("#page_contents a").map((link) => [link.hash.slice(1), link]));
  const seen = new Map();
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) seen.set(entry.target.id, entry.isIntersecting);
      const current = [...links.keys()].find((id) => seen.get(id));
      for (const [id, link] of links) {
        if (id !== current) link.removeAttribute("aria-current");
        else if (!link.hasAttribute("aria-current")) {
          link.setAttribute("aria-current", "true");
          const toc = link.closest(".toc");
          toc.scrollLeft = link.offsetLeft - toc.clientWidth / 2 + link.offsetWidth / 2;
        }
      }
    },
    { rootMargin: "-80px 0px -60% 0px" },
  );
  for (const id of links.keys()) {
    const section = document.getElementById(id);
    if (section) watcher.observe(section);
  }
}
