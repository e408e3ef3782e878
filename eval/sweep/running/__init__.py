"""A sweep at work: encoding, a process per run, locks and orders in its folder, who looks on."""
