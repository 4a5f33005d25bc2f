"""Stands in for kubectl: writes down how it was called, and answers as it was told; the real one does `kustomize`.

FAKE_KUBECTL is a folder. `answers.json` holds [pattern, exit status, output] in order; the first pattern that is found
in the call's words answers, otherwise nothing is said, with status 0. `calls.jsonl` gets a line for each call.
"""

import json
import os
import re
import sys


def main() -> int:
    folder, words = os.environ["FAKE_KUBECTL"], sys.argv[1:]
    if words[0] == "kustomize":
        os.execv(os.environ["REAL_KUBECTL"], ["kubectl", *words])
    reads = any(word in ("-", "--from-file=password=/dev/stdin") for word in words)
    with open(f"{folder}/calls.jsonl", "a") as calls:
        calls.write(json.dumps({"call": " ".join(words), "stdin": sys.stdin.read() if reads else ""}) + "\n")
    with open(f"{folder}/answers.json") as file:
        answers = json.load(file)
    for pattern, code, output in answers:
        if re.search(pattern, " ".join(words)):
            print(output, end="", file=sys.stderr if code else sys.stdout)
            return int(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
