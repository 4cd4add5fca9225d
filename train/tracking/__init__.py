"""Records of a training: metrics, console, throughput, profile, receipt, report."""
