"""Tables and pages for people: plans, shards and runs."""
