"""From finished evaluations to a report: paired documents, statistics, verdicts. Reads no model."""
