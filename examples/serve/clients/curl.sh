#!/bin/sh
# curl on adlocal serve: an answer that streams, a line a chunk.
#
#     ADLOCAL_URL=http://127.0.0.1:8080 ADLOCAL_KEY=... sh curl.sh
set -eu

# The key goes in on standard input: an argument would stand in the list of processes.
printf 'header = "Authorization: Bearer %s"\n' "${ADLOCAL_KEY:-none}" |
    curl --config - --no-buffer --silent --show-error --fail-with-body \
        --header "Content-Type: application/json" \
        --data '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 99, "stream": true}' \
        "${ADLOCAL_URL:-http://127.0.0.1:8080}/v1/chat/completions"
