"""Write the alerts of mlops/monitoring/alerting_rules.yml into monitoring.yaml, as the PrometheusRule at its end.

python mlops/kubernetes/write_rules.py
"""

from pathlib import Path
from textwrap import indent

HERE = Path(__file__).resolve().parent
RULES, MONITORING = HERE.parent / "monitoring/alerting_rules.yml", HERE / "monitoring.yaml"
HEAD = """---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ldm3d
spec:
"""


def with_rules(monitoring: str, rules: str) -> str:
    """`monitoring.yaml` with these rules in place of those that it has."""
    return monitoring.split(HEAD)[0].rstrip("\n") + "\n" + HEAD + indent(rules, "  ")


if __name__ == "__main__":
    MONITORING.write_text(with_rules(MONITORING.read_text(), RULES.read_text()))
