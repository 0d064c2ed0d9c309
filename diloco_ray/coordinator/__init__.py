"""The coordinator without Ray: receive, reduce, perform."""
