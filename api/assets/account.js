// Takes the secret of a link from the part of the address that no server is sent, and gives it to the API once.
const LINKS = {
  invitation: {
    title: "You are invited",
    told: "Choose a password. If you have an account already, give its password.",
    autocomplete: "current-password",
    url: "/api/v1/invitations/accept",
    body: (token, password, name) => ({ token, password, ...(name ? { name } : {}) }),
    done: "You are a member now: log in with your e-mail and this password.",
  },
  reset: {
    title: "Set a new password",
    told: "Every session of yours ends when it is set.",
    autocomplete: "new-password",
    url: "/api/v1/auth/password/reset",
    body: (token, password) => ({ token, new_password: password }),
    done: "The password is set: log in with it.",
  },
};
const [title, told, form, name, password] = ["title", "told", "form", "name", "password"]
  .map((id) => document.getElementById(id));

function say(text, isError = false) {
  told.textContent = text;
  told.classList.toggle("error", isError);
}

async function send(link, token) {
  const body = JSON.stringify(link.body(token, password.value, name.value.trim()));
  const answer = await fetch(link.url, { method: "POST", headers: { "Content-Type": "application/json" }, body });
  if (answer.ok) {
    form.hidden = true;
    return say(link.done);
  }
  const problem = await answer.json();
  return say(problem.detail ?? problem.title, true);
}

const [kind, token] = location.hash.slice(1).split("=");
const link = Object.hasOwn(LINKS, kind) && token ? LINKS[kind] : null;
if (link) {
  history.replaceState(null, "", location.pathname); // the secret stays in no history
  title.textContent = link.title;
  say(link.told);
  password.autocomplete = link.autocomplete;
  document.getElementById("name-field").hidden = kind !== "invitation";
  form.hidden = false;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    await send(link, token).catch(() => say("The server cannot be reached: try again.", true));
    button.disabled = false;
  });
}
