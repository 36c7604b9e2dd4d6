/** Compare two sort keys, numbers before texts; "" comes last in either direction. */
function compareKeys(a, b, descending) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const [x, y] = [Number(a), Number(b)];
  let order;
  if (!Number.isNaN(x) && !Number.isNaN(y)) order = x - y;
  else if (Number.isNaN(x) !== Number.isNaN(y)) order = Number.isNaN(x) ? 1 : -1;
  else order = a.localeCompare(b, "en", { numeric: true });
  return descending ? -order : order;
}

// What Python writes and JavaScript's Number() does not read.
const sortKey = (cell) => ({ inf: "Infinity", "-inf": "-Infinity" })[cell.dataset.key] ?? cell.dataset.key;

function sortTable(table, at, descending) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [sortKey(row.cells[at]), row]);
  rows.sort((a, b) => compareKeys(a[0], b[0], descending));
  body.append(...rows.map(([, row]) => row));
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    if (i === at) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

/** Make the headers buttons. Numbers begin with the largest. */
function prepareTable(table) {
  [...table.tHead.rows[0].cells].forEach((head, at) => {
    const button = el("button", { type: "button", class: "sort" }, ...head.childNodes);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const numeric = !head.classList.contains("text") && !head.classList.contains("group");
      sortTable(table, at, now ? now === "ascending" : numeric);
    });
    head.replaceChildren(button);
  });
}

/** A table of objects: the data behind a chart. */
function tableOf(rows, label) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const isNumber = (name) => rows.some((row) => typeof row[name] === "number");
  const kinds = names.map((name) => (isNumber(name) ? "number" : "text"));
  const most = 2000;
  const table = el(
    "table",
    { class: "sortable" },
    el("thead", {}, el("tr", {}, ...names.map((name, i) => el("th", { scope: "col", class: kinds[i] }, name)))),
    el(
      "tbody",
      {},
      ...rows.slice(0, most).map((row) =>
        el(
          "tr",
          {},
          ...names.map((name, i) => {
            const value = row[name] ?? null;
            const key = value === null || isSpecial(value) ? "" : String(value);
            return el("td", { class: kinds[i], "data-key": key }, shown(value, 6));
          }),
        ),
      ),
    ),
  );
  prepareTable(table);
  const region = el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": label }, table);
  if (rows.length <= most) return [region];
  return [region, el("p", { class: "table-note" }, `The first ${shown(most)} of ${counted(rows.length, "row")}.`)];
}
