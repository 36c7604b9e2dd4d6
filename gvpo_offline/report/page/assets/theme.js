// The reader's choice of dark or light, before the page is painted.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("gvpo-theme");
  } catch {
    // A file opened from disk may have no storage.
  }
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
})();
