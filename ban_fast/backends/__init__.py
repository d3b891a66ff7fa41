"""Where losses are computed. `interface.Backend` says what a backend offers, `dispatch` which one serves a call."""
