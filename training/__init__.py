"""How a bridge learns: objectives and the taps that they need; torch only."""
