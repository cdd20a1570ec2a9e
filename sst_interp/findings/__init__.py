"""What a run says: the paper's claims, the ledger that judges them, findings kept with a run."""
