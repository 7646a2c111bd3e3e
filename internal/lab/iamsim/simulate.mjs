// Answers each case of standard input, a JSON list, with Allowed, ExplicitlyDenied, ImplicitlyDenied or an error's text.
import { readFileSync } from 'node:fs'
import { runSimulation } from '@cloud-copilot/iam-simulate'

const answers = []
for (const simulation of JSON.parse(readFileSync(0, 'utf8'))) {
  const r = await runSimulation(simulation, { simulationMode: 'Strict' })
  answers.push({
    answer: r.resultType === 'error' ? 'error: ' + JSON.stringify(r.errors) : r.overallResult,
    ignored: (r.result ?? r.results?.[0])?.ignoredContextKeys ?? [],
  })
}
console.log(JSON.stringify(answers))
