"""Metrics, throughput, profiles, receipts and reports of a training.

To add a metric of the step, add a float32 scalar to `metrics` in `lit_fast.train.step`; to add one that is measured on
the host, add it to `ThroughputMeter.read`. Both are then in metrics.jsonl, in every tracker and in report.html.
A statistic of the logits is added to `LogitSums` or `LogitMaxima` and to `logit_metrics` in `lit_fast.losses`.
`TITLES` in `lit_fast.report.charts` gives a chart its title, `console` chooses the metrics of its lines. A name with a
slash is a metric of the evaluation.
"""
