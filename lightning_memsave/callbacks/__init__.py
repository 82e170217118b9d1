"""Lightning callbacks: thin shells over the mechanisms below."""
