"""The ledger of one attempt: node-local, one writer, group commit, published in segments."""
