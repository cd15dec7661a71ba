"""From finished evaluations to a report: paired documents, statistics, verdicts. Loads no model."""
