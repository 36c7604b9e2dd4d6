"use strict";

const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

/** An element. Texts become text nodes: nothing here parses markup. */
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Numbers that JSON lacks come as NUL and their name. */
const isSpecial = (value) => typeof value === "string" && value.startsWith("\0");
const SPECIAL = { "\0nan": "NaN", "\0inf": "∞", "\0-inf": "-∞" };

/** A value with `digits` significant digits. */
function shown(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (isSpecial(value)) return SPECIAL[value] ?? value.slice(1);
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  if (value === 0) return "0";
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(digits - 1).replace("e+", "e");
  const decimals = Math.max(digits - 1 - Math.floor(Math.log10(size)), 0);
  return value.toLocaleString("en-US", {
    minimumFractionDigits: decimals,
    maximumFractionDigits: decimals,
  });
}

const counted = (n, word) => `${n.toLocaleString("en-US")} ${word}${n === 1 ? "" : "s"}`;

/** Names and values beside the pointer; null hides them. */
function showTooltip(event, lines) {
  const tip = $("#page_tooltip") ?? document.body.appendChild(el("div", { id: "page_tooltip", class: "tooltip", "aria-hidden": "true" }));
  tip.hidden = lines === null;
  if (tip.hidden) return;
  tip.replaceChildren(...lines.map(([name, text]) => el("div", {}, el("span", {}, name), el("b", {}, String(text)))));
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(Math.min(event.clientX + 14, room), 8)}px`;
  const fits = event.clientY + 16 + tip.offsetHeight < innerHeight;
  tip.style.top = `${fits ? event.clientY + 16 : event.clientY - tip.offsetHeight - 12}px`;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function labelTheme() {
  const button = $("#theme_switch");
  button.textContent = isDark() ? "Light" : "Dark";
  button.title = `Show the page ${isDark() ? "light" : "dark"} (d)`;
}

function switchTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("gvpo-theme", theme);
  } catch {
    // The choice then lasts until the page is closed.
  }
  labelTheme();
}
