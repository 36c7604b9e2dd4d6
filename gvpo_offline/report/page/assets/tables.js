// Python's spelling, which Number() does not read.
const INFINITIES = { inf: Infinity, "-inf": -Infinity };

/** Compare two keys; "" comes last in either direction, texts after the numbers of a column. */
function compareKeys(a, b, numeric, descending) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const [x, y] = numeric ? [a, b].map((key) => INFINITIES[key] ?? Number(key)) : [NaN, NaN];
  const [noX, noY] = [Number.isNaN(x), Number.isNaN(y)];
  if (noX !== noY) return noX - noY;
  let order = noX ? a.localeCompare(b, "en", { numeric: true }) : 0;
  if (!noX && x !== y) order = x < y ? -1 : 1;
  return descending ? -order : order;
}

const isNumeric = (head) => !head.classList.contains("text") && !head.classList.contains("group");

function sortTable(table, at, descending) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const numeric = isNumeric(heads[at]);
  const rows = [...body.rows].map((row) => [row.cells[at].dataset.key, row]);
  rows.sort((a, b) => compareKeys(a[0], b[0], numeric, descending));
  body.append(...rows.map(([, row]) => row));
  heads.forEach((head, i) => {
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
      sortTable(table, at, now ? now === "ascending" : isNumeric(head));
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
