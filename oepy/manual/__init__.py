"""Manual keying: SAs and policies that somebody wrote down instead of IKE negotiating them. Values, checks and
presentation, without IO; `daemon/manual.py` and `datapath/xfrm/` bring them into effect."""
