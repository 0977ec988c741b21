-- A chat.created of about 1 kB for each request, four turns a session. BENCH_PREFIX keeps runs apart.
local prefix = os.getenv("BENCH_PREFIX")
local text = string.rep("A sentence of the usual length that a customer writes. ", 5)
local number = 0

wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
wrk.headers["x-webhook-secret"] = os.getenv("ARCHIVER_WEBHOOK_SECRETS")

request = function()
  number = number + 1
  local chat = prefix .. "-" .. number
  local session = prefix .. "-s" .. math.floor(number / 4)
  return wrk.format(nil, nil, nil, '{"message":{"type":"chat.created","timestamp":' .. (1705311000000 + number)
    .. ',"chat":{"id":"' .. chat .. '","externalChatId":"x' .. number .. '","sessionId":"' .. session
    .. '","input":"' .. number .. ": " .. text .. '","output":[{"role":"assistant","content":"' .. text
    .. '"}],"assistantId":"assistant-1","status":"completed","cost":0.0123,"createdAt":"2024-01-15T09:30:00.123Z"'
    .. ',"updatedAt":"2024-01-15T09:30:02.456Z","assistantOverrides":{"variableValues":'
    .. '{"companyName":"Example","serviceType":"repair","customerTier":"Premium"}}}}}')
end
