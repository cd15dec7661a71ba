"""`dae rank-teachers`: which teacher suits this student."""
