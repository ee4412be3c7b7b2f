"""The whole model: erniem_fast beside its rivals, and where its time goes."""
