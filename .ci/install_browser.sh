# Installs Chromium for the browser tests where it is missing and this user may. Prints nothing else.
set -eu
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing Chromium for the browser tests" >&2
  apt-get install -y -qq chromium >/dev/null 2>&1 ||
    { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null
else
  echo "no Chromium, and no root with apt-get to install it: install it for the browser tests" >&2
  exit 1
fi
