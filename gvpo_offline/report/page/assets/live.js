// As the server sent the page, before scripts add to it: what a newer page is compared with.
const sources = new Map();
const sourceOf = (root) => root.outerHTML;

function blocksOf(section) {
  return $$("[data-block]", section).map((block, i) => [`${section.id}/${block.id || i}`, block]);
}

for (const section of $$("[data-section]")) {
  for (const [key, block] of blocksOf(section)) sources.set(key, sourceOf(block));
}
const groupsSource = () => $("#groups_data")?.textContent ?? null;

/** Where the reader is: the first block in view, and how far it is from the top. */
function readersPlace() {
  const node = $$("[data-block], #groups_reader").find((block) => block.getBoundingClientRect().bottom > 60);
  return { node, id: node?.id, top: node?.getBoundingClientRect().top };
}

function returnTo({ node, id, top }) {
  const now = node?.isConnected ? node : id ? document.getElementById(id) : null;
  const moved = now ? now.getBoundingClientRect().top - top : 0;
  if (Math.abs(moved) > 1 && scrollY > 0) scrollBy(0, moved);
}

/** Take the news of a chart: its element stays, and with it whether its data are open. */
function updateChart(old, fresh) {
  for (const part of [".title", ".summary", ".chart-data", "details.data > summary"]) {
    $(part, old).replaceChildren(...$(part, fresh).childNodes);
  }
  const details = $("details.data", old);
  for (const part of [...details.children].slice(1)) part.remove();
  if (details.open) details.dispatchEvent(new Event("toggle"));
}

/** Take the news of a table: sorted as before, scrolled as before. */
function updateTable(old, fresh) {
  prepareTable($("table", fresh));
  const heads = $$("th", old);
  const sorted = heads.findIndex((head) => head.hasAttribute("aria-sort"));
  if (sorted >= 0 && sorted < $$("th", fresh).length) {
    sortTable($("table", fresh), sorted, heads[sorted].getAttribute("aria-sort") === "descending");
  }
  const open = $("details", old)?.open;
  if (open && $("details", fresh)) $("details", fresh).open = true;
  const { scrollTop, scrollLeft } = $(".scroll", old);
  const focused = $$("button", old).indexOf(document.activeElement);
  old.replaceWith(fresh);
  Object.assign($(".scroll", fresh), { scrollTop, scrollLeft });
  $$("button", fresh)[focused]?.focus({ preventScroll: true });
}

/** Bring one section up to date; returns the charts to draw. */
function updateSection(old, fresh) {
  const charts = [];
  for (const part of ["h2", ".look-for"]) {
    if ($(part, old) && $(part, fresh)) $(part, old).textContent = $(part, fresh).textContent;
  }
  const known = new Map(blocksOf(old));
  const wanted = blocksOf(fresh);
  const keys = new Set(wanted.map(([key]) => key));
  for (const [key, block] of known) if (!keys.has(key)) block.remove();
  let after = $(".look-for", old) ?? $("h2", old);
  for (const [key, block] of wanted) {
    const source = sourceOf(block);
    let node = known.get(key);
    const sameKind = node?.className === block.className;
    if (!node || sources.get(key) !== source) {
      if (sameKind && block.classList.contains("chart-block")) {
        updateChart(node, block);
        charts.push(node);
      } else {
        const next = document.importNode(block, true);
        if (sameKind && block.classList.contains("table-block")) updateTable(node, next);
        else {
          $$("table.sortable", next).forEach(prepareTable);
          if (node) node.replaceWith(next);
          if (next.matches(".chart-block")) {
            prepareChart(next);
            charts.push(next);
          }
        }
        node = next;
      }
      sources.set(key, source);
    }
    if (after.nextElementSibling !== node) after.after(node);
    after = node;
  }
  return charts;
}

function updateSections(fresh) {
  const charts = [];
  const wanted = $$("[data-section]", fresh);
  const ids = new Set(wanted.map((section) => section.id));
  for (const section of $$("[data-section]")) if (!ids.has(section.id)) section.remove();
  let after = $(".head");
  for (const section of wanted) {
    let node = document.getElementById(section.id);
    if (!node) {
      node = document.importNode(section, true);
      for (const [key, block] of blocksOf(section)) sources.set(key, sourceOf(block));
      $$("table.sortable", node).forEach(prepareTable);
      $$(".chart-block", node).forEach(prepareChart);
      charts.push(...$$(".chart-block", node));
    } else charts.push(...updateSection(node, section));
    if (after.nextElementSibling !== node) after.after(node);
    after = node;
  }
  return charts;
}

async function update(html, reader) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  const groups = $("#groups_data", fresh);
  const cannot = (groups !== null) !== (reader !== null) || ($(".chart-block", fresh) && !window.vegaEmbed);
  if (cannot) {
    location.reload(); // the page now needs scripts or parts that this one lacks
    return;
  }
  const place = readersPlace();
  document.title = fresh.title;
  for (const part of ["h1", ".subtitle"]) $(part).textContent = $(part, fresh).textContent;
  const charts = updateSections(fresh);
  const toc = (root) => $$("#page_contents a", root).map((link) => `${link.hash} ${link.textContent}`).join("\n");
  if (toc(document) !== toc(fresh)) {
    $("#page_contents").replaceChildren(...$$("#page_contents > li", fresh).map((item) => document.importNode(item, true)));
    followSections();
  }
  if (reader && groups.textContent !== groupsSource()) {
    $("#groups_data").textContent = groups.textContent;
    const note = $("#groups-to-read > .look-for");
    if (note) note.textContent = $("#groups-to-read > .look-for", fresh)?.textContent ?? "";
    reader.load();
  }
  returnTo(place);
  await drawCharts(charts);
  returnTo(place);
}

function startLive(reader) {
  const state = $("#live_state");
  const say = (text, lost) => {
    const label = state.lastElementChild;
    if (label.textContent !== text) label.textContent = text;
    state.classList.toggle("lost", lost);
  };
  const clock = () => new Date().toLocaleTimeString("en-GB");
  let tag = "";
  let lostSince = null;
  let busy = false;
  async function ask() {
    if (busy || document.hidden) return;
    busy = true;
    try {
      const answer = await fetch(location.pathname, { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.status === 200) {
        const first = tag === "";
        tag = answer.headers.get("ETag") ?? "";
        await update(await answer.text(), reader);
        say(first ? "Live" : `Live, changed ${clock()}`, false);
        document.documentElement.dataset.updates = Number(document.documentElement.dataset.updates ?? -1) + 1;
      } else if (answer.status === 304) {
        if (lostSince) say("Live", false);
      } else throw new Error((await answer.text()).slice(0, 200));
      lostSince = null;
      state.title = "";
    } catch (error) {
      lostSince ??= clock();
      say(`Not connected since ${lostSince}`, true);
      state.title = error.message;
    } finally {
      busy = false;
    }
  }
  setInterval(ask, 2000);
  document.addEventListener("visibilitychange", ask);
  ask();
}
