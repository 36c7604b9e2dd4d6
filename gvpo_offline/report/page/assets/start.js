const reader = $("#groups_reader") ? new Reader($("#groups_reader")) : null;
for (const id of ["#theme_switch", "#help_open"]) $(id).hidden = false;
labelTheme();
$("#theme_switch").addEventListener("click", switchTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", labelTheme);
$$("table.sortable").forEach(prepareTable);
$$(".chart-block").forEach(prepareChart);
startKeys(reader);
followSections();
if (reader) {
  reader.follow(location.hash);
  reader.started = true;
  addEventListener("hashchange", () => reader.follow(location.hash));
}
// Charts take their place above: the group of the address is brought into view again, unless the
// reader has moved meanwhile.
let moved = false;
for (const event of ["wheel", "touchmove", "keydown", "mousedown"]) {
  addEventListener(event, () => (moved = true), { once: true, passive: true });
}
drawCharts($$(".chart-block")).then(() => {
  if (!moved && reader && location.hash) reader.follow(location.hash);
  document.documentElement.dataset.ready = "";
  if (typeof startLive === "function") startLive(reader);
});
