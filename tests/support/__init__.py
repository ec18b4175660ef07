"""What tests share: made-up groups, programs that run in ranks, servers, and defective modes."""
