"""A server whose times are known, to hold the benchmark against: `script` says what it sends, `scripted` sends it."""
