"""The demo: what it trains, its report, and the report's template."""
