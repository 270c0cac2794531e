"""Tools that show what sparse attention kept: the audit of a model, the walk through one query block, the report page.

true_attention -> layer_statistics, predictions, remedies -> model_audit     what sparse lost, where, and what would mend it
walkthrough, costs                                                           one query block through every step
capture -> arrays, pictures, report_page                                     masks and scores of every layer and head
"""
