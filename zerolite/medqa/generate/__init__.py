"""Rows for training written by a model behind an OpenAI-compatible endpoint: `zerolite generate`.

    plan.requests → Request → runner → endpoint.Endpoint.ask → Answer → journal.Journal
      → replies.items → filters.Filters → result.write → rows.jsonl, card.md, rejected.jsonl

Requests depend on the seed and the files alone. An answer is on the disk before it is counted, and everything behind
the journal is computed from it again at each start: what a kill costs is the requests in flight.
"""
