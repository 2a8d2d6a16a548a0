// Copy buttons on code, where the browser can copy; the page is whole without them.
for (const code of document.querySelectorAll("pre code, dd code")) {
  const text = code.textContent;
  if (!navigator.clipboard || (code.closest("dd") && !text.includes("("))) continue;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "copy";
  button.setAttribute("aria-label", "copy " + text.split("\n")[0]);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
  (code.closest("pre") || code).after(button);
}
// Only a table that is wider than the page needs to be reached by the keyboard.
for (const box of document.querySelectorAll(".scroll, pre")) {
  if (box.clientWidth && box.scrollWidth <= box.clientWidth) box.removeAttribute("tabindex");
}
