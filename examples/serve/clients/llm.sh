#!/bin/sh
# llm (pip install llm) on adlocal serve, with a directory of its own that is gone afterwards.
#
#     ADLOCAL_URL=http://127.0.0.1:8080 ADLOCAL_KEY=... sh llm.sh "Why is the sky blue?"
#
# To keep it: put extra-openai-models.yaml into the directory of `llm logs path`, and run `llm keys set adlocal`. From
# then on there is `llm -m adlocal "..."`.
set -eu
umask 077

LLM_USER_PATH=$(mktemp -d)
export LLM_USER_PATH
trap 'rm -r "$LLM_USER_PATH"' EXIT

cat > "$LLM_USER_PATH/extra-openai-models.yaml" <<END
- model_id: adlocal
  model_name: default
  api_base: ${ADLOCAL_URL:-http://127.0.0.1:8080}/v1
  api_key_name: adlocal
END
printf '{"adlocal": "%s"}\n' "${ADLOCAL_KEY:-none}" > "$LLM_USER_PATH/keys.json"

llm -m adlocal "${1:-Why is the sky blue?}"
