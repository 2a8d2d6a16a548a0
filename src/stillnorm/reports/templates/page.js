// Copy buttons on code.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // a frame in a notebook may not, and some pages have no clipboard
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = text;
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}
for (const code of document.querySelectorAll("pre code, dd code")) {
  const text = code.textContent;
  if (code.closest("dd") && !text.includes("(")) continue;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "copy";
  button.setAttribute("aria-label", "copy " + text.split("\n")[0]);
  button.addEventListener("click", async () => {
    button.textContent = (await copy(text)) ? "copied" : "cannot copy here";
    button.focus();
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
  (code.closest("pre") || code).after(button);
}
// Only a table that is wider than the page needs to be reached by the keyboard.
for (const box of document.querySelectorAll(".scroll, pre")) {
  if (box.clientWidth && box.scrollWidth <= box.clientWidth) box.removeAttribute("tabindex");
}
