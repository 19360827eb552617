"""Union of published segments, generations, the remainder, and the plan of the next round."""
