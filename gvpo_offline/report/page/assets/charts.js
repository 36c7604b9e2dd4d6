const COMPOSED = ["hconcat", "vconcat", "concat", "facet", "repeat"];
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif';

// Colours are CSS variables, so that a chart follows the theme without being drawn again.
const CATEGORIES = [1, 2, 3, 4, 5, 6, 7, 8].map((i) => `var(--c${i})`);
const CHART_CONFIG = {
  background: "transparent",
  font: FONT,
  view: { stroke: null },
  padding: { left: 0, right: 4, top: 4, bottom: 6 },
  axis: {
    labelColor: "var(--muted)", titleColor: "var(--muted)", gridColor: "var(--line)",
    domainColor: "var(--strong-line)", tickColor: "var(--strong-line)",
    labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 8,
    labelPadding: 6, tickSize: 4, labelLimit: 160, titleLimit: 320,
  },
  axisX: { grid: false },
  axisXQuantitative: { tickCount: { signal: "ceil(width / 90)" } },
  axisY: { domain: false, ticks: false, tickCount: 5 },
  legend: {
    labelColor: "var(--text)", titleColor: "var(--muted)", labelFontSize: 12, titleFontSize: 12,
    titleFontWeight: "normal", orient: "top", direction: "horizontal", symbolSize: 90, offset: 8,
    labelLimit: 220, symbolStrokeWidth: 2,
  },
  header: { labelColor: "var(--text)", titleColor: "var(--muted)", labelFontSize: 12, titleFontWeight: "normal" },
  title: { color: "var(--text)", fontSize: 13, fontWeight: 600, anchor: "start" },
  range: { category: CATEGORIES, ordinal: { scheme: "viridis" }, ramp: { scheme: "viridis" }, heatmap: { scheme: "viridis" }, diverging: { scheme: "blueorange" } },
  mark: { color: "var(--c1)" },
  bar: { tooltip: true },
  rect: { tooltip: true },
  point: { tooltip: true, filled: true, size: 45, opacity: 0.8 },
  circle: { tooltip: true, size: 45, opacity: 0.8 },
  tick: { tooltip: true, thickness: 2 },
  line: { strokeWidth: 2 },
  area: { opacity: 0.25 },
  rule: { color: "var(--muted)" },
  text: { color: "var(--text)", fontSize: 12 },
  boxplot: { box: { fill: "var(--c1)" }, median: { color: "var(--surface)" }, rule: { color: "var(--muted)" }, outliers: { color: "var(--c1)", size: 20 }, ticks: { color: "var(--muted)" } },
  errorbar: { color: "var(--muted)" },
  errorband: { opacity: 0.2 },
  // What a specification may name as `style` of a mark.
  style: {
    band: { color: "var(--good)", opacity: 0.13, tooltip: null },
    guide: { color: "var(--muted)", strokeDash: [4, 4] },
    warning: { color: "var(--warning)" },
    error: { color: "var(--error)" },
    muted: { color: "var(--muted)" },
  },
};

/** The fields of a mark, as text. */
function chartTooltip(handler, event, item, value) {
  const none = value === null || value === undefined || value === "";
  showTooltip(event, none ? null : typeof value === "object" ? Object.entries(value) : [["", value]]);
}

/** The specification with a size: Vega-Lite fits single views to the page, not composed ones. */
function sized(spec, width, height, rows) {
  const inner = Math.max(width - 56, 120);
  if (spec.hconcat || spec.concat || spec.vconcat) {
    const name = COMPOSED.find((key) => spec[key]);
    const across = spec.hconcat ? spec.hconcat.length : name === "concat" ? spec.columns ?? 1 : 1;
    const parts = spec[name].map((view) => ({
      width: Math.max(Math.floor(inner / across) - 24, 100), height, ...view,
    }));
    return { ...spec, [name]: parts };
  }
  const composed = COMPOSED.some((key) => spec[key]);
  const encoding = spec.encoding ?? {};
  if (composed || encoding.row || encoding.column || encoding.facet) {
    const column = encoding.column ?? spec.facet?.column;
    const values = column ? new Set(rows.map((row) => row[column.field])).size : 1;
    const across = spec.columns ?? encoding.facet?.columns ?? values;
    const size = { width: Math.max(Math.floor(inner / across) - 24, 100), height };
    return spec.spec ? { ...spec, spec: { ...size, ...spec.spec } } : { ...size, ...spec };
  }
  return { height, ...spec, width: "container", autosize: { type: "fit-x", contains: "padding" } };
}

/** The names that a channel of a chart shows; none if it shows no field. */
function namesOf(spec, channel, rows) {
  const views = [spec, ...(spec.layer ?? []), spec.spec ?? {}];
  const shows = views.map((view) => view.encoding?.[channel]).find((one) => one?.field);
  return shows ? [...new Set(rows.map((row) => String(row[shows.field] ?? "")))] : [];
}

const longest = (names) => Math.max(0, ...names.map((name) => Math.min(name.length, 32)));

/** What of the configuration depends on the room: labels are upright, and legends in columns. */
function fitting(spec, width, rows) {
  const below = namesOf(spec, "x", rows);
  const upright = (7 * longest(below) + 12) * below.length < width - 60;
  const columns = Math.floor((width - 60) / (7 * longest(namesOf(spec, "color", rows)) + 36));
  return {
    axisXDiscrete: { labelAngle: upright ? 0 : -38 },
    legend: { ...CHART_CONFIG.legend, columns: Math.max(columns, 1) },
  };
}

const chartViews = new WeakMap();
const chartFacts = (figure) => JSON.parse($(".chart-data", figure).textContent);

async function drawChart(figure) {
  const { spec, title, height, rows } = chartFacts(figure);
  const target = $(".chart", figure);
  const finite = (row) => Object.fromEntries(Object.entries(row).map(([k, v]) => [k, isSpecial(v) ? null : v]));
  const full = {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    description: title,
    ...sized(spec, target.clientWidth, height, rows),
    data: { values: rows.map(finite) },
  };
  chartViews.get(figure)?.finalize();
  try {
    const done = await window.vegaEmbed(target, full, {
      mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false, config: { ...CHART_CONFIG, ...fitting(spec, target.clientWidth, rows) },
      ast: true, // expressions are interpreted: the page's policy forbids eval
      tooltip: chartTooltip,
      logLevel: 1,
    });
    chartViews.set(figure, done);
    // Vega gives a mark without fields, such as a band, the role of a picture and no name.
    for (const mark of $$("[role=graphics-symbol]:not([aria-label])", target)) {
      mark.removeAttribute("role");
      mark.setAttribute("aria-hidden", "true");
    }
    target.dataset.drawn = "";
  } catch (error) {
    target.replaceChildren(el("p", { class: "empty" }, `This chart cannot be drawn: ${error.message}`));
    console.error(`${figure.id}: ${error.message}`);
  }
}

function prepareChart(figure) {
  const details = $("details.data", figure);
  details.addEventListener("toggle", () => {
    if (details.open && !$("table", details)) {
      details.append(...tableOf(chartFacts(figure).rows, $(".title", figure).textContent));
    }
  });
}

/** One after the other, so that the page answers in between. */
async function drawCharts(figures) {
  for (const figure of figures) {
    await drawChart(figure);
    await new Promise((resolve) => setTimeout(resolve));
  }
}

/** Views without a container's width are drawn again when the page changes its own. */
let drawnWidth = innerWidth;
let redraw = 0;
addEventListener("resize", () => {
  if (innerWidth === drawnWidth) return;
  clearTimeout(redraw);
  redraw = setTimeout(() => {
    drawnWidth = innerWidth;
    drawCharts($$(".chart-block"));
  }, 200);
});
