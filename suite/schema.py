"""Columns of the CSV files and the schema version of a run folder; their meaning stands in results/README.md."""

SCHEMA_VERSION = 2
# Columns that folders of version 1 lack; readers take them as empty there.
SINCE_2 = frozenset("fewshot_split chat aggregation item n_choices n_gold".split())

ACCURACY = (
    "run_id cell_id model dtype method mode sparsity_target sparsity_realized estimator predictor rank calibration fit_id "
    "scope sparse_share bytes_share task task_version data_fingerprint num_fewshot fewshot_split chat filter metric "
    "higher_is_better aggregation value stderr chance delta_dense delta_ci_low delta_ci_high "
    "n_samples limit batch_size seed status reason elapsed_s"
).split()
SAMPLES = "cell_id task doc_id metric value item n_choices n_gold".split()
SPEED = (
    "run_id cell_id level model model_shape d_model d_ff n_layers activation dtype method mode sparsity_target "
    "sparsity_realized predictor rank backend variant threads batch_size context_tokens clock cache rounds "
    "latency_us_median latency_us_q25 latency_us_q75 latency_us_min jit_s capture_s launch_us tokens_per_s mlp_share "
    "bytes_read_mib read_bandwidth_gb_s efficiency peak_memory_mib extra_memory_mib max_rel_error check device_name "
    "driver_version status reason"
).split()
PHASES = "cell_id phase us_median us_q05 us_q95".split()
DECODE_CHECK = "cell_id n_steps max_error bound kl_median kl_q95 kl_max top1_agreement".split()
SPARSITY = "cell_id layer site threshold sparsity_target sparsity_realized n_tokens".split()
PREDICTOR = (
    "fit_id model method predictor rank sparsity_target layer recall precision overlap_at_k mass_kept mass_kept_ideal "
    "sparsity_realized train_tokens loss fit_s peak_memory_mib"
).split()
CLAIMS = (
    "claim model method against mode scope sparsity_target sparsity_realized quantity value ci_low ci_high abstract_says "
    "verdict reason"
).split()
ACTIVATIONS = (
    "model dtype layer quantity mean q05 q25 q50 q75 q95 q99 mass_kept_at_50 mass_kept_at_70 mass_kept_at_80 "
    "mass_kept_at_90 n_tokens"
).split()
CIF_CAF = "model row_method sparsity cif_alive cif_dead caf_alive caf_dead n_tokens".split()
