#!/usr/bin/env bash
# README.md from nbs/index.ipynb; paths of pictures and notebooks are made those from the root.
set -euo pipefail
cd "$(dirname "$0")/.."
jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb | sed -E \
    -e 's#\]\(images/#](nbs/images/#g' \
    -e 's#\]\(([a-z0-9/_]+(\.ipynb|/))\)#](nbs/\1)#g' \
    -e 's#\]\(\.\./#](#g' > README.md.new
mv README.md.new README.md
