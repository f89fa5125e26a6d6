"""int8 codes and their row scales back to weights."""
