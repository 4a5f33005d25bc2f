"""Do new volumes look like those that the model was trained on?

    python -m mlops.monitoring.data_drift --reference checkpoints/demo --data FOLDER --output results/drift

Compares a folder of volumes with the reference profile that training left beside the weights. Exit status: 0 no drift,
1 drift, 2 an error, also where there are too few volumes to say that nothing has drifted. In the output folder:
`drift.json`, `drift.html`, and `drift.prom` for node-exporter's textfile collector; `--push URL` sends the same metrics
to a pushgateway (job `ldm3d_drift`).

Metrics, each a gauge, written by every run that came to a judgement:

    ldm3d_drift_detected                     1 where anything drifted, else 0
    ldm3d_drift_feature_detected{feature=}   the same for each feature, fact ("orientation", "scanner") and "latents"
    ldm3d_drift_feature_p_value{feature=}    corrected for the number of tests (Holm)
    ldm3d_drift_feature_psi{feature=}        population stability index, of features only
    ldm3d_drift_latent_mmd                   squared maximum mean discrepancy of latents, where they could be compared
    ldm3d_drift_alpha                        probability of a false alarm that a run accepts
    ldm3d_drift_volumes{state=}              "judged", "unreadable"
    ldm3d_drift_last_run_timestamp_seconds   when
"""
